"""Costs of sites: equal to what the runtime's plans save, and right on modules small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.errors import ScheduleError, ScheduleMismatchError, SiteError
from harmonica_rt.plan.plan import build_plan
from harmonica_training.costs import SiteCosts, count_costs
from tests.models import stack, stack_call

LINEAR = 2 * 3 * 4 * 4  # a Linear(4, 4) on three rows


class Sample:
    """A tiny denoiser with the arguments of its first call in a run."""

    def __init__(self, name: str) -> None:
        tiny = pytest.importorskip("tests.tiny", reason="the families are diffusers pipelines")
        family = tiny.families()[name]
        pipeline = tiny.built(family.build)
        self.model: nn.Module = pipeline.transformer
        calls: list[tuple[Any, Any]] = []
        hook = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        pipeline(num_inference_steps=2, **family.guided)
        hook.remove()
        self.args, self.kwargs = calls[0]

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)

    def flops(self) -> dict[str, int]:
        """FLOPs of each module by path, by torch's own counter; `""` is the model."""

        def attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return int(sdpa_flop_count(query, key, value))

        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={on_cpu: attention}) as counter:
            self()
        root = type(self.model).__name__
        counts = counter.get_flop_counts()
        return {path.removeprefix(root).removeprefix("."): sum(n.values()) for path, n in counts.items()}


def random_mask(steps: int, sites: int, seed: int) -> NDArray[np.bool_]:
    mask = np.random.default_rng(seed).random((steps, sites)) < 0.5
    mask[0] = True
    return mask


@pytest.mark.parametrize("name", ["dit", pytest.param("pixart-alpha", marks=pytest.mark.exhaustive), "sd3", "flux"])
def test_speedups_are_those_of_the_plans(name: str) -> None:
    sample = Sample(name)
    sites = find_sites(sample.model)
    costs = count_costs(sample.model, sites, sample)
    assert costs.total == sample.flops()[""]
    captured = capture(sample.model, CallConvention(sample.model).normalise(sample.args, sample.kwargs), sites)
    for seed in range(4):
        mask = random_mask(6, len(sites), seed)
        plan = build_plan(captured, Schedule.from_array(mask, sites=sites))
        assert plan.theoretical_speedup > 1.0
        assert costs.speedup(mask) == pytest.approx(plan.theoretical_speedup, rel=1e-9)
        assert costs.total == plan.full_flops


def test_flux_projection_covers_the_attention_and_mlp_before_it() -> None:
    sample = Sample("flux")
    block = "single_transformer_blocks.1"
    costs = count_costs(sample.model, [f"{block}.proj_out"], sample)
    flops = sample.flops()
    assert flops[f"{block}.proj_out"] < flops[f"{block}.attn"] + flops[f"{block}.proj_mlp"]
    # all that stays of the block is its modulation, for the gate of the projection
    assert costs.total - costs.left([False]) == flops[block] - flops[f"{block}.norm"]


def test_sd3_context_goes_once_every_attention_after_it_is_reused() -> None:
    sample = Sample("sd3")
    context, attention = "transformer_blocks.1.ff_context", "transformer_blocks.2.attn"
    costs = count_costs(sample.model, [context, attention], sample)
    flops = sample.flops()
    assert costs.total - costs.left([False, True]) == flops[context]
    assert costs.left([True, False]) == costs.left([False, False])
    assert costs.total - costs.left([True, False]) >= flops[context] + flops[attention]


class Layers(nn.Module):
    """Linear layers of width 4 by name; each subclass joins them in its own way."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


def costs_of(model: nn.Module, *sites: str, around: Callable[[], Any] = torch.no_grad) -> SiteCosts:
    x = torch.randn(3, 4)

    def call() -> Any:
        with around():
            return model(x)

    return count_costs(model.eval(), sites, call)


class Chain(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


def test_a_step_also_computes_what_only_later_steps_read() -> None:
    costs = costs_of(Chain("first", "second"), "first", "second")
    assert costs.alone.tolist() == [0.5, 1.0]
    assert costs.left([True, False]) == 0
    unread = np.array([[1, 1], [1, 0], [1, 1]], bool)
    read = np.array([[1, 1], [1, 0], [0, 1]], bool)  # `first` of step 1 feeds `second` of step 2
    assert costs.speedup(unread) == 6 / (2 + 0 + 2)
    assert costs.speedup(read) == 6 / (2 + 1 + 1)
    read_later = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], bool)
    assert costs.speedup(read_later) == 8 / (2 + 1 + 0 + 1)


class WritesInPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        both = x.new_zeros(3, 8)
        left, right = both.chunk(2, dim=1)
        left.copy_(self.a(self.before_a(x)).mul_(2.0))
        right += self.b(x)
        torch.mul(both, 2.0, out=both)
        x = self.entry(x)
        x += both.sum(dim=1, keepdim=True)
        return x


def test_writes_in_place_are_followed_through_views() -> None:
    costs = costs_of(WritesInPlace("before_a", "a", "b", "entry"), "a", "b")
    assert costs.total == 4 * LINEAR
    assert costs.alone.tolist() == [2 / 4, 1 / 4]
    assert costs.left([False, False]) == LINEAR


class ReturnsAView(Layers):
    def __init__(self) -> None:
        super().__init__("entry")
        self.view = nn.Flatten(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return self.view(x) + x.reshape(-1)


def test_reusing_a_view_does_not_take_away_what_it_is_a_view_of() -> None:
    assert costs_of(ReturnsAView(), "view").alone.tolist() == [0.0]


class Tied(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shared(self.first(x))
        return x + self.shared(self.last(x)) + self.other(x)


def test_all_calls_of_a_tied_module_are_reused_together() -> None:
    costs = costs_of(Tied("shared", "first", "last", "other"), "shared", "other")
    assert costs.total == 5 * LINEAR
    assert costs.alone.tolist() == pytest.approx([4 / 5, 1 / 5])


class TwoOutputs(Layers):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": self.first(x), "second": self.second(x)}


class UsesOneLast(Layers):
    def __init__(self) -> None:
        super().__init__("between")
        self.pair = TwoOutputs("first", "second")

    def forward(self, x: Tensor) -> Tensor:
        pair = self.pair(x)
        return pair["first"] + self.between(pair["second"])


def test_outputs_of_one_site_live_and_die_each_by_itself() -> None:
    costs = costs_of(UsesOneLast(), "pair", "between")
    assert costs.alone.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert costs.left([True, False]) == LINEAR  # of the pair, the output that feeds `between` goes with it


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]  # a batch, which eval mode would run as one fused operator
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_fused_and_composite_operators_are_counted(around: Callable[[], Any]) -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    # queries, keys and values, out; then every row with every row, for scores and for their sums
    assert costs_of(Attends(), "attention", around=around).total == 4 * LINEAR + 2 * (2 * 3 * 3 * 4)
    assert torch.backends.mha.get_fastpath_enabled() == fast


class LeavesOut(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_sites_that_cannot_be_counted_are_told() -> None:
    model = LeavesOut("used", "left_out")
    with pytest.raises(SiteError, match=r"LeavesOut has no module blocks\.7\.attn"):
        costs_of(model, "used", "blocks.7.attn")
    with pytest.raises(SiteError, match=r"1 of 2 sites give no tensor .* \(the first is left_out\)"):
        costs_of(model, "used", "left_out")
    with pytest.raises(ValueError, match="call returned no tensor that it computed"):
        count_costs(model, ["used"], lambda: [model(torch.randn(3, 4)), None][1])
    assert not any(module._forward_hooks for module in model.modules())


def test_masks_that_do_not_fit_are_told() -> None:
    costs = costs_of(Chain("first", "second"), "first", "second")
    with pytest.raises(ScheduleMismatchError, match=r"expected a mask of shape \[steps, 2\], got \[4, 3\]"):
        costs.speedup(np.ones((4, 3), bool))
    with pytest.raises(ScheduleMismatchError, match=r"expected a mask of shape \[2\], got \[1, 2\]"):
        costs.left(np.ones((1, 2), bool))
    with pytest.raises(TypeError, match="float64"):
        costs.speedup(np.ones((4, 2)))
    with pytest.raises(ScheduleError, match="first row that is all True"):
        costs.speedup(np.array([[True, False], [True, True]]))


def test_counting_leaves_the_model_as_it_was() -> None:
    model, sites = stack(), find_sites(stack())
    kept = model.blocks[0].attn.register_forward_hook(lambda module, args, output: output + 1.0)
    before = model(**stack_call(0))
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    costs = count_costs(model, sites, lambda: model(**stack_call(0)))
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(**stack_call(0)), before)
    assert torch.is_grad_enabled()
    kept.remove()
    again = count_costs(model, sites, lambda: model(**stack_call(0)))
    assert np.array_equal(again.alone, costs.alone)
