"""What torch.compile traced is captured as what torch.export traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from harmonica_rt import find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.capture.dynamo import DynamoGraph, GraphCall
from harmonica_rt.capture.dynamo_frame import traced_frame
from harmonica_rt.errors import CaptureError, Obstacle
from harmonica_rt.graph.functionalise import is_mutating
from tests.models import stack, stack_call


def traced(call: Callable[[Any], Any], model: nn.Module, sites: list[str]) -> tuple[DynamoGraph, GraphCall]:
    """What a backend sees when `call` calls the compiled model."""
    seen: list[tuple[DynamoGraph, GraphCall]] = []

    def backend(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graph = DynamoGraph(module, traced_frame(module), sites)

        def run(*values: Any) -> Any:
            seen.append((graph, graph.call(values)))
            return module(*values)

        return run

    torch.compiler.reset()
    with torch.no_grad():
        call(torch.compile(model, backend=backend, fullgraph=True))
    (only,) = seen
    return only


def operators(captured: CapturedGraph) -> list[str]:
    return [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]


def run(captured: CapturedGraph, call: GraphCall) -> Any:
    """Interpret the captured graph."""
    weights = call.parameters()
    values = []
    for node in captured.graph.find_nodes(op="placeholder"):
        if node.name in captured.parameters:
            values.append(weights[captured.parameters[node.name]])
        elif node.name in captured.inputs:
            values.append(call.leaves[captured.inputs[node.name]])
        else:
            values.append(captured.constants[node.name])
    with torch.no_grad():
        return fx.Interpreter(fx.GraphModule(captured.root, captured.graph)).run(*values)


def test_dynamo_and_export_give_the_same_graph_and_sites() -> None:
    model, kwargs = stack(depth=2), stack_call(0)
    sites = find_sites(model)
    graph, call = traced(lambda compiled: compiled(**kwargs), model, sites)
    captured = graph.capture(call)
    exported = capture(model, CallConvention(model).normalise((), kwargs), sites)
    assert operators(captured) == operators(exported)
    names = [[str(node.target) for node in nodes] for nodes in captured.site_outputs]
    assert names == [[str(node.target) for node in nodes] for nodes in exported.site_outputs]
    assert {"latents", "timestep"} < set(call.paths)
    assert set(captured.parameters.values()) == {name for name, _ in model.named_parameters()}
    assert all(call.parameters()[name] is parameter for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(run(captured, call)[0], model(**kwargs))


OUTSIDE = torch.ones(4)


class Traits(nn.Module):
    """A buffer, a tensor attribute, a global tensor, a constant, nested arguments, and an in-place operator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.full((4,), 2.0))
        self.plain = torch.full((4,), 3.0)

    def forward(self, x: torch.Tensor, extra: dict[str, Any], repeat: int = 1) -> torch.Tensor:
        y = self.linear(x) + self.shift + self.plain + OUTSIDE + torch.tensor([1.0, 2.0, 3.0, 4.0])
        with torch.no_grad():
            y.mul_(extra["scales"][0])
        return y * repeat


def test_parameters_and_arguments_are_told_apart() -> None:
    model, x, scale = Traits().eval(), torch.randn(2, 4), torch.randn(4)
    graph, call = traced(lambda compiled: compiled(x, extra={"scales": [scale]}, repeat=2), model, ["linear"])
    captured = graph.capture(call)
    assert {"x", "extra.scales.0"} == {path for path in graph.inputs.values()}
    names = set(graph.parameters.values())
    assert {"linear.weight", "linear.bias", "shift", "plain"} < names
    assert [name for name in names if "OUTSIDE" in name]
    assert not any(is_mutating(node) for node in captured.graph.nodes)
    assert len(captured.site_outputs[0]) == 1
    with torch.no_grad():
        assert torch.equal(run(captured, call)[0], model(x, {"scales": [scale]}, repeat=2))


class ByPosition(Traits):
    @torch.no_grad()
    def forward(self, x: torch.Tensor, extra: dict[str, Any], repeat: int = 1) -> torch.Tensor:
        return super().forward(x, extra, repeat)


def test_arguments_behind_a_wrapper_have_the_names_of_the_model() -> None:
    model, extra = ByPosition().eval(), {"scales": [torch.randn(4)]}
    graph, _ = traced(lambda compiled: compiled(torch.randn(2, 4), extra=extra), model, ["linear"])
    assert set(graph.inputs.values()) == {"x", "extra.scales.0"}


def test_calls_with_other_plain_values_have_other_signatures() -> None:
    model, x, extra = Traits().eval(), torch.randn(2, 4), {"scales": [torch.randn(4)]}
    signatures = [
        traced(lambda compiled, n=repeat: compiled(x, extra, n), model, ["linear"])[1].signature for repeat in (1, 2, 2)
    ]
    assert signatures[1] != signatures[0]
    assert signatures[1] == signatures[2]


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return self.linear(x)


def test_a_model_that_writes_to_its_inputs_is_refused() -> None:
    graph, call = traced(lambda compiled: compiled(torch.randn(2, 4)), Writes().eval(), ["linear"])
    with pytest.raises(CaptureError) as error:
        graph.capture(call)
    assert error.value.failure.obstacle is Obstacle.MUTATION
