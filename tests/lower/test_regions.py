"""Step graphs divided into regions: the same values, few regions, and nothing in them that does not belong there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.lower.fuse import fuse
from harmonica_rt.lower.hoist import cut, plan_prologue
from harmonica_rt.lower.plain import with_stores
from harmonica_rt.lower.regions import Region, divide, sections, whole
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.plan.step_graph import StepGraph
from tests import tiny
from tests.models import stack, stack_call

STEPS = 8


def random_schedule(sites: list[str], patterns: int) -> Schedule:
    """That many distinct rows, the first of which computes all."""
    rows = np.random.default_rng(1).random((patterns, len(sites))) < 0.5
    rows[0] = True
    return Schedule.from_array(rows[[0, *(1 + step % (patterns - 1) for step in range(STEPS - 1))]], sites=sites)


def dit(layers: int) -> nn.Module:
    transformer = tiny.dit().transformer
    return tiny.randomised(type(transformer).from_config(transformer.config, num_layers=layers))  # type: ignore[no-any-return]


def dit_call() -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }


def bodies(
    model: nn.Module, call: dict[str, Any], schedule: Schedule, *, fused: bool = True
) -> tuple[Plan, list[StepGraph]]:
    """The plan and its step graphs as the lowering divides them: fused, and cut from the prologue."""
    normal = CallConvention(model).normalise((), call)
    captured = capture(model, normal, schedule.sites)
    plan = build_plan(captured, schedule)
    steps = [fuse(step).step for step in plan.programs] if fused else list(plan.programs)
    prologue = plan_prologue(captured, steps, roles(normal), schedule.steps)
    return plan, [cut(step, prologue.names) for step in steps]


class Eager:
    """A region that runs operator by operator."""

    def __init__(self, region: Region, name: str) -> None:
        self.__name__ = name
        self.run = fx.GraphModule({}, region.graph).forward

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(*inputs)  # type: ignore[no-any-return]


class Regions:
    """Every region that a division asks for."""

    def __init__(self) -> None:
        self.all: list[Region] = []

    def __call__(self, region: Region) -> Eager:
        self.all.append(region)
        return Eager(region, f"region_{len(self.all)}")

    @property
    def unique(self) -> dict[str, Region]:
        return {region.key: region for region in self.all}


def regions_of(plan: Plan, steps: list[StepGraph]) -> Regions:
    found = Regions()
    for step in steps:
        divide(step, sections(plan.captured), found)
    return found


def run(plan: Plan, step: StepGraph, graph: fx.Graph) -> Iterator[Tensor]:
    """Outputs and stored values for random arguments of the layouts that the step graph gives."""
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for node in step.graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        argument = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        arguments.append(argument.copy_(torch.randn(fake.shape, generator=generator)))
    with torch.no_grad():
        results, stored = fx.GraphModule(plan.captured.root, graph)(*arguments)
    yield from (*results, *stored)


def test_a_region_carries_no_values() -> None:
    model = stack()
    found = regions_of(*bodies(model, stack_call(0), random_schedule(find_sites(model), 4)))
    assert found.all
    assert not any("val" in node.meta for region in found.all for node in region.graph.nodes)


@pytest.mark.parametrize("family", ["dit", "pixart", "stack", "unfused stack"])
def test_a_divided_graph_computes_the_same(family: str) -> None:
    call: dict[str, Any]
    if family == "dit":
        model, call = dit(2), dit_call()
    elif family == "pixart":
        model = tiny.pixart_alpha().transformer
        call = {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 7, 12),
            "encoder_attention_mask": torch.ones(2, 7),
            "timestep": torch.tensor([3, 3]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    else:
        model, call = stack(), stack_call(0)
    plan, steps = bodies(model, call, random_schedule(find_sites(model), 4), fused="unfused" not in family)
    found = Regions()
    for step in steps:
        divided = divide(step, sections(plan.captured), found)
        for got, expected in zip(run(plan, step, divided.graph), run(plan, step, step.graph), strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()
    assert len(found.all) > len(found.unique) > 1  # shared, and more than one kind


def test_neither_blocks_nor_patterns_make_regions() -> None:
    """Unfused: runs of reused residuals are of any length, but regions end at sites. (Fused: tests/lower.)"""

    def unique(layers: int, patterns: int) -> set[str]:
        model = dit(layers)
        schedule = random_schedule(find_sites(model), patterns)
        return set(regions_of(*bodies(model, dit_call(), schedule, fused=False)).unique)

    few = unique(3, 8)
    assert unique(5, 8) == few
    assert unique(3, 3) <= few
    assert len(few) <= 8


def test_regions_hold_whole_sites_and_no_harmonica_ops() -> None:
    model = dit(2)
    plan, steps = bodies(model, dit_call(), Schedule.every(2, steps=4, sites=find_sites(model)))
    found = regions_of(plan, steps)
    kinds = [[str(node.target) for node in region.graph.nodes] for region in found.unique.values()]
    assert not [kind for kind in kinds if any("harmonica" in target for target in kind)]
    attention = [kind for kind in kinds if any("attention" in target for target in kind)]
    assert [kind.count("aten.linear.default") for kind in attention] == [4, 4]  # q, k, v, out: the first block, others
    assert [kind for kind in kinds if kind.count("aten.linear.default") == 2 and "aten.gelu.default" in kind]


def test_a_region_takes_and_gives_no_views() -> None:
    model = dit(2)
    plan, steps = bodies(model, dit_call(), random_schedule(find_sites(model), 4))
    slots = {node.name for step in steps for node in step.read_nodes}
    for step in steps:
        divided = divide(step, sections(plan.captured), Regions())
        for call in divided.graph.nodes:
            if not isinstance(call.target, Eager):
                continue
            for source in call.all_input_nodes:
                made = source.target.__name__ if source.op == "call_function" else source.op
                assert made in ("placeholder", "getitem"), f"{source} is a view"
                assert source.name not in slots
            assert all(user.target is operator.getitem for user in call.users)


def test_the_key_tells_what_differs() -> None:
    class Two(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.site = nn.Linear(4, 4)
            self.factor = factor

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            y: Tensor = self.site(x)
            return y + x.exp() * self.factor + timestep[0]

    def key(factor: float, x: Tensor) -> str:
        model = Two(factor).eval()
        schedule = Schedule.all_compute(steps=2, sites=["site"])
        plan, steps = bodies(model, {"x": x, "timestep": torch.ones(1)}, schedule)
        (region,) = regions_of(plan, steps).unique.values()
        return region.key

    x = torch.randn(4, 4)
    assert key(2.0, x) == key(2.0, torch.zeros(4, 4))
    assert key(2.0, x) != key(3.0, x)
    assert key(2.0, x) != key(2, x)  # a whole number promotes otherwise
    assert key(2.0, x) != key(2.0, torch.randn(5, 4))
    assert key(2.0, x) != key(2.0, torch.randn(4, 4).t())


class Adding(nn.Module):
    """A block whose site is what a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attn = Applied(function)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks[0].attn(x)


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "compiles"),
    [
        (torch.exp, True),
        (lambda x: x + torch.rand_like(x), False),  # a compiler draws other numbers
        (
            lambda x: x[:, :1].exp().expand_as(x),
            False,
        ),  # the slot of an expanded value has fewer addresses than elements
    ],
    ids=["ordinary", "random", "expanded"],
)
def test_what_can_be_compiled_whole(function: Callable[[Tensor], Tensor], compiles: bool) -> None:
    model = Adding(function).eval()
    schedule = Schedule.every(2, steps=2, sites=["blocks.0.attn"])
    _, (step, _) = bodies(model, {"x": torch.randn(2, 3)}, schedule)
    region = whole(step, with_stores(step, direct=False))
    assert (region is not None) == compiles
    if region is not None:
        assert len(region.inputs) == len(region.graph.find_nodes(op="placeholder")) == 2  # x, and the slot
