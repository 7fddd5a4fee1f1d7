"""Plans of one captured graph share the programs of equal patterns, and the prologue."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.lower import hoist
from harmonica_rt.lower.inductor import InductorLowering
from harmonica_rt.options import HOISTED
from harmonica_rt.plan.plan import Plan, build_plan
from tests.models import stack, stack_call

MODEL = stack(depth=2)
SITES = find_sites(MODEL)
CALL = CallConvention(MODEL).normalise((), stack_call(0))
LOWERINGS = ["plain", "fused", HOISTED]


def plans(*steps: int, k: int = 2) -> list[Plan]:
    captured, schedule = capture(MODEL, CALL, SITES), Schedule.every(k, steps=8, sites=SITES).with_taylor()
    return [build_plan(captured, schedule.resample(number)) for number in steps]


def lowered(plan: Plan, lowering: str, like: LoweredPlan | None = None) -> LoweredPlan:
    return LoweredPlan(plan, roles(CALL), lowering, like=like)


def result(plan: LoweredPlan, step: int) -> list[torch.Tensor]:
    """What a step gives, from slots of ones; hoisted values are given as ones as well."""
    program = plan.lowering.programs[plan.plan.steps[step].program]
    given = program.step
    bound = program.bind(dict(MODEL.named_parameters()), plan.plan.captured.constants)

    def ones(nodes: Any) -> list[torch.Tensor]:
        return [torch.ones_like(node.meta["val"], device="cpu") for node in nodes]

    arguments = given.argument_nodes
    before = len(given.parameters) + len(given.constants) + len(given.inputs)
    hoisted = [torch.ones(tuple(n.meta["val"].shape)) for n in arguments[before : before + len(given.hoisted)]]
    reads = [torch.ones(tuple(node.meta["val"].shape)) for node in given.read_nodes]
    writes = [torch.empty(tuple(node.meta["val"].shape)) for node in given.stored_nodes]
    with torch.no_grad():
        return [*program(bound, CALL.leaves, reads, writes, hoisted), *writes]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equal_patterns_share_a_program(lowering: str) -> None:
    first, second, third = plans(8, 12, 13)
    base = lowered(first, lowering)
    same, more = lowered(second, lowering, base), lowered(third, lowering, base)
    assert same.lowering.programs == base.lowering.programs  # the same objects: programs have no equality of their own
    assert set(base.lowering.programs) < set(more.lowering.programs)
    assert len(more.lowering.programs) == len(third.patterns) == 3  # the last step stores nothing
    assert same.prologue is base.prologue
    fusion = more.lowering.report().fusion
    assert fusion == lowered(third, lowering).lowering.report().fusion


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_shared_program_computes_what_one_of_its_own_would(lowering: str) -> None:
    first, second = plans(8, 13)
    shared, alone = lowered(second, lowering, lowered(first, lowering)), lowered(second, lowering)
    for step in range(len(second.steps)):
        for a, b in zip(result(shared, step), result(alone, step), strict=True):
            assert torch.equal(a, b)


def test_a_program_is_freed_with_the_last_plan_that_has_it() -> None:
    first, second, third = plans(8, 13, 21)
    base = lowered(first, "fused")
    more = lowered(second, "fused", base)
    (own,) = set(more.lowering.programs) - set(base.lowering.programs)
    again = lowered(third, "fused", base)  # its last step stores nothing as well
    assert own in again.lowering.programs
    seen = weakref.ref(own)
    del own, more
    gc.collect()
    assert seen() is not None
    del again
    gc.collect()
    assert seen() is None


def test_the_report_has_the_bytes_of_all_steps() -> None:
    first, second = plans(8, 40)
    base = lowered(first, "fused")
    shared = lowered(second, "fused", base)
    alone = lowered(second, "fused").lowering.report().hoisting
    assert shared.lowering.report().hoisting == alone
    assert base.lowering.report().hoisting.nbytes < alone.nbytes


def test_a_prologue_that_would_hold_too_much_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, less = plans(8, 40, 4)
    base = lowered(first, "fused")
    held = base.lowering.report().hoisting.nbytes
    monkeypatch.setattr("harmonica_rt.lower.fused.LIMIT", held)
    monkeypatch.setattr(hoist.plan_prologue, "__kwdefaults__", {"limit": held})
    apart = lowered(second, "fused", base)
    assert apart.prologue is not base.prologue
    assert apart.lowering.report().hoisting.nbytes <= held
    assert lowered(less, "fused", base).prologue is base.prologue


def test_compiled_regions_are_shared() -> None:
    first, second = plans(8, 13)
    base = InductorLowering(first, roles(CALL))
    compiled = base.report().regions
    assert compiled is not None
    made = base.for_plan(second)
    assert made is not None
    regions = made.report().regions
    assert regions is not None
    assert set(base.programs) < set(made.programs)
    assert len(made.programs) == 3
