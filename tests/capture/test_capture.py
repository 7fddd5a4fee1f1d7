from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import fx, nn

from harmonica_rt import find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import CaptureError, Obstacle
from harmonica_rt.graph.functionalise import is_mutating
from harmonica_rt.indices import SiteIndex
from tests.models import stack, stack_call


def captured_of(model: nn.Module, sites: list[str], **kwargs: Any) -> CapturedGraph:
    return capture(model, CallConvention(model).normalise((), kwargs), sites)


def run(captured: CapturedGraph, model: nn.Module, leaves: list[Any]) -> Any:
    """Interpret the captured graph."""
    values = []
    for node in captured.graph.find_nodes(op="placeholder"):
        if node.name in captured.parameters:
            values.append(model.get_parameter(captured.parameters[node.name]))
        elif node.name in captured.inputs:
            values.append(leaves[captured.inputs[node.name]])
        elif node.name in captured.constants:
            values.append(captured.constants[node.name])
        else:
            values.append(None)  # a plain value, baked in
    with torch.no_grad():
        return fx.Interpreter(fx.GraphModule(captured.root, captured.graph)).run(*values)


def test_the_graph_does_what_the_model_does_and_copies_no_weight() -> None:
    model, call = stack(), stack_call(0)
    captured = captured_of(model, find_sites(model), **call)
    (output,) = run(captured, model, list(call.values()))
    with torch.no_grad():
        assert torch.equal(output, model(**call))
    assert set(captured.parameters.values()) == {name for name, _ in model.named_parameters()}
    assert captured.constants == {}


def test_every_site_is_cut_where_its_value_leaves_it() -> None:
    model = stack(depth=2)
    captured = captured_of(model, find_sites(model), **stack_call(0))
    for site, outputs in zip(captured.sites, captured.site_outputs, strict=True):
        assert len(outputs) == 1
        stack_paths = [path for path, _ in outputs[0].meta["nn_module_stack"].values()]
        assert site in stack_paths
        assert all(site not in [p for p, _ in user.meta["nn_module_stack"].values()] for user in outputs[0].users)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joint = Joint()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.joint(x)
        return x + a * 2 + b


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.linear(x).chunk(2, dim=-1)
        return a, b


def test_a_site_may_have_two_outputs() -> None:
    captured = captured_of(TwoOutputs().eval(), ["joint"], x=torch.randn(3, 4))
    assert [tuple(node.meta["val"].shape) for node in captured.site_outputs[0]] == [(3, 4), (3, 4)]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y.mul_(2.0).add_(x)
        return y


def test_in_place_operators_are_made_functional() -> None:
    model, x = InPlace().eval(), torch.randn(3, 4)
    captured = captured_of(model, ["linear"], x=x)
    assert not any(is_mutating(node) for node in captured.graph.nodes)
    with torch.no_grad():
        assert torch.equal(run(captured, model, [x])[0], model(x))


class CountsCalls(InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.linear(x)


class Branches(InPlace):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("model", "obstacle"),
    [
        (CountsCalls().eval(), Obstacle.MUTATION),
        (Branches().eval(), Obstacle.EXPORT),
        (InPlace().train(), Obstacle.TRAINING),
    ],
    ids=["buffer", "branch", "training"],
)
def test_what_cannot_be_captured_says_why(model: nn.Module, obstacle: Obstacle) -> None:
    with pytest.raises(CaptureError) as error:
        captured_of(model, ["linear"], x=torch.randn(3, 4))
    assert error.value.failure.obstacle is obstacle
    assert obstacle.value in str(error.value)


class Attends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("left_in_training", ["linear", "attend", "drop"])
def test_modules_left_in_training_mode_are_refused(left_in_training: str) -> None:
    """A LoRA's layers are: what counts is whether something is drawn."""
    layers = {"linear": nn.Linear(4, 4), "attend": Attends(), "drop": nn.Dropout(0.5)}
    model = nn.Sequential(OrderedDict(layers)).eval()
    model.get_submodule(left_in_training).train()
    call = CallConvention(model).normalise((torch.randn(1, 2, 4),), {})
    if left_in_training == "drop":
        with pytest.raises(CaptureError, match=r"training mode: call model\.eval\(\) first \(at drop\)"):
            capture(model, call, ["linear"])
    else:
        assert len(capture(model, call, ["linear"]).outputs_of(SiteIndex(0))) == 1


def test_hooks_inside_are_an_obstacle_that_names_the_module() -> None:
    model = stack(depth=1)
    model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"hooks.*blocks\.0\.mlp"):
        captured_of(model, find_sites(model), **stack_call(0))


def test_sites_that_never_run_are_refused_when_none_does() -> None:
    model = stack()
    model.spare = nn.Linear(2, 2).eval()
    with pytest.raises(CaptureError, match="none of the 1 sites does anything"):
        captured_of(model, ["spare"], **stack_call(0))


def test_dropped_identities_leave_no_dropout_or_clone_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    captured = capture(model, CallConvention(model).normalise((torch.randn(2, 4),), {}), ["0"])
    targets = {str(node.target) for node in captured.graph.nodes if node.op == "call_function"}
    assert targets == {"aten.linear.default"}
