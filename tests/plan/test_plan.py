from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import InvariantError, ScheduleMismatchError
from harmonica_rt.indices import SiteIndex, SlotId, StepIndex
from harmonica_rt.plan.histories import histories
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, Step, build_plan
from tests.models import random_weights, stack, stack_call

MODEL = stack(depth=2)
SITES = find_sites(MODEL)


@functools.cache
def captured_once() -> CapturedGraph:
    return capture(MODEL, CallConvention(MODEL).normalise((), stack_call(0)), SITES)


@pytest.fixture(scope="module")
def captured() -> CapturedGraph:
    return captured_once()


def plan_of(captured: CapturedGraph, rows: list[str]) -> Plan:
    mask = np.array([[digit == "1" for digit in row] for row in rows])
    return build_plan(captured, Schedule.from_array(mask, sites=SITES))


def test_histories_name_the_steps_whose_values_are_taken() -> None:
    compute = np.array([[1, 1], [1, 1], [0, 1], [1, 0], [0, 0]], bool)
    plain = histories(Schedule.from_array(compute, sites=["a", "b"]))
    assert plain.steps[:, :, 0].tolist() == [[-1, -1], [-1, -1], [1, -1], [-1, 2], [3, 2]]
    assert plain.taken.tolist() == [0, 0]
    weights = np.zeros((5, 2, 3))
    weights[2, 0], weights[4, 0], weights[3:, 1] = (0.5, 0, 0), (2, 0, -1), (1, 0, 0)
    summed = histories(Schedule.from_array(compute, sites=["a", "b"]).with_weights(weights))
    assert summed.taken.tolist() == [3, 0]
    assert summed.steps[4, 0].tolist() == [3, 1, 0]
    assert summed.steps[2, 0].tolist() == [1, -1, -1]
    assert [summed.source(StepIndex(2), SiteIndex(0), age) for age in range(3)] == [1, 1, 1]


def test_stores_are_made_only_where_a_later_step_reads(captured: CapturedGraph) -> None:
    plan = plan_of(captured, ["1111", "1111", "0111", "1011"])
    stored = [[SITES[output.site] for output in plan.programs[step.program].stores] for step in plan.steps]
    assert stored == [[], [SITES[0]], [SITES[1]], []]
    lives = [(slot.value.first, slot.value.last) for slot in plan.table.slots]
    assert lives == [(1, 2), (2, 3)]


def test_equal_patterns_share_a_program(captured: CapturedGraph) -> None:
    plan = plan_of(captured, ["1111", "0000", "1111", "0000", "1111"])
    # the last step stores nothing, so it is a third pattern
    assert [step.program for step in plan.steps] == [0, 1, 0, 1, 2]
    assert plan.steps[0].writes != plan.steps[2].writes  # other values, which may share memory
    assert plan.table.arena_bytes == plan.table.lower_bound


def test_reused_work_is_gone_from_the_step_graph(captured: CapturedGraph) -> None:
    plan = plan_of(captured, ["1111", "0000"])
    full, none = (program.graph for program in plan.programs)
    linear = torch.ops.aten.linear.default
    assert len(full.find_nodes(op="call_function", target=linear)) == 7
    assert len(none.find_nodes(op="call_function", target=linear)) == 1  # the timestep embedding
    assert set(plan.programs[1].parameters) == {"embed.weight", "embed.bias"}
    assert plan.program_flops[1] < plan.program_flops[0] == plan.full_flops


def test_flops_of_the_full_program_are_those_of_the_model(captured: CapturedGraph) -> None:
    plan = plan_of(captured, ["1111", "0101"])
    batch, tokens, width = 2, 4, 8
    rows = batch * tokens
    per_block = 2 * rows * width * width + 2 * (2 * rows * width * 2 * width)
    assert plan.full_flops == 2 * per_block + 2 * batch * 1 * width
    left = plan.full_flops - 2 * (2 * rows * width * width)
    assert plan.theoretical_speedup == pytest.approx(2 * plan.full_flops / (plan.full_flops + left))


def test_a_site_that_feeds_only_reused_sites_is_not_stored() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(self.first(x))

    model = Chain().eval()
    graph = capture(model, CallConvention(model).normalise((torch.randn(2, 4),), {}), ["first", "second"])
    plan = build_plan(graph, Schedule.every(2, steps=2, sites=["first", "second"]))
    check_plan(plan)
    assert [[graph.sites[output.site] for output in program.stores] for program in plan.programs] == [["second"], []]


@st.composite
def masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    steps = draw(st.integers(1, 8))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=steps, max_size=steps))
    mask = np.array(rows, bool)
    mask[0] = True
    return mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(masks(), st.integers(0, 4))
def test_every_schedule_gives_a_plan_that_keeps_the_rules(mask: NDArray[np.bool_], order: int) -> None:
    graph = capture(MODEL, CallConvention(MODEL).normalise((), stack_call(0)), SITES) if not CACHE else CACHE[0]
    CACHE.append(graph)
    schedule = Schedule.from_array(mask, sites=SITES)
    plan = build_plan(graph, random_weights(schedule, order, seed=len(mask)) if order else schedule)
    check_plan(plan)
    for step in range(len(mask)):
        program, slots = plan.catch_up_graph(StepIndex(step))
        alive = [s.id for s in plan.table.slots if s.value.first <= step < s.value.last]
        stored = [s.id for s in plan.table.slots if s.value.first == step]
        assert sorted(slots) == (stored if order else alive)  # nothing else may stand in a weighted sum
        assert program.reads == ()


CACHE: list[CapturedGraph] = []


def test_another_order_of_sites_is_refused(captured: CapturedGraph) -> None:
    with pytest.raises(ScheduleMismatchError, match="the same sites in the same order"):
        build_plan(captured, Schedule.every(2, steps=2, sites=SITES[::-1]))


class TestBrokenPlans:
    """Each rule of the invariants, broken by hand, is noticed."""

    @pytest.fixture
    def plan(self, captured: CapturedGraph) -> Plan:
        return plan_of(captured, ["1111", "0000", "1010", "0101"])

    def broken(self, plan: Plan, step: int, **changes: object) -> Plan:
        steps = list(plan.steps)
        steps[step] = dataclasses.replace(steps[step], **changes)  # type: ignore[arg-type]
        return dataclasses.replace(plan, steps=tuple(steps))

    def test_sound(self, plan: Plan) -> None:
        check_plan(plan)

    def test_read_before_store(self, captured: CapturedGraph) -> None:
        plan = plan_of(captured, ["1111", "0000", "1111", "0000"])
        with pytest.raises(InvariantError, match="step 1 reads slot 4, which nothing stored before"):
            check_plan(self.broken(plan, 1, reads=plan.steps[3].reads))

    def test_stale_read(self, captured: CapturedGraph) -> None:
        plan = plan_of(captured, ["1111", "0000", "1111", "0000"])
        with pytest.raises(InvariantError, match="step 3 reads slot 0, stored in step 0 and not in step 2"):
            check_plan(self.broken(plan, 3, reads=plan.steps[1].reads))

    def test_wrong_program(self, plan: Plan) -> None:
        with pytest.raises(InvariantError, match="step 2: the program and the schedule reuse different sites"):
            check_plan(self.broken(plan, 2, program=plan.steps[0].program))

    def test_slots_of_other_sites(self, plan: Plan) -> None:
        with pytest.raises(InvariantError, match="from the slot of"):
            check_plan(self.broken(plan, 1, reads=plan.steps[1].reads[::-1]))

    def test_missing_store(self, plan: Plan) -> None:
        with pytest.raises(InvariantError, match="its stores and their slots differ in number"):
            check_plan(self.broken(plan, 0, writes=plan.steps[0].writes[:-1]))

    def test_overlapping_slots(self, plan: Plan) -> None:
        slots = tuple(dataclasses.replace(slot, offset=0) for slot in plan.table.slots)
        table = dataclasses.replace(plan.table, slots=slots)
        with pytest.raises(InvariantError, match=r"slots \d+ and \d+ overlap"):
            check_plan(dataclasses.replace(plan, table=table))

    def test_slot_outside_its_arena(self, plan: Plan) -> None:
        table = dataclasses.replace(plan.table, arena_bytes={torch.device("cpu"): 64})
        with pytest.raises(InvariantError, match="outside its arena"):
            check_plan(dataclasses.replace(plan, table=table))

    def test_wasteful_arena(self, plan: Plan) -> None:
        table = dataclasses.replace(plan.table, arena_bytes={torch.device("cpu"): 2**20})
        with pytest.raises(InvariantError, match=r"where .* are enough"):
            check_plan(dataclasses.replace(plan, table=table))

    def test_mutating_operator(self, plan: Plan) -> None:
        graph = plan.programs[0].graph
        node = next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)))
        with graph.inserting_after(node):
            extra = graph.call_function(torch.ops.aten.mul_.Scalar, (node, 2.0))
        with pytest.raises(InvariantError, match="mutating operator"):
            check_plan(plan)
        graph.erase_node(extra)


def test_steps_know_their_slots(captured: CapturedGraph) -> None:
    plan = plan_of(captured, ["1111", "0111"])
    assert plan.steps[0] == Step(plan.steps[0].program, (), (SlotId(0),))
    assert plan.steps[1].reads == (SlotId(0),)


@st.composite
def weighted_schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(2, 12))
    cur, seed = draw(st.floats(0.1, 0.8)), draw(st.integers(0, 99))
    schedule = Schedule.random(min(cur, (steps - 1) / steps), steps=steps, sites=SITES, seed=seed)
    if draw(st.booleans()):
        schedule = schedule.with_taylor(draw(st.integers(1, 3)))
    elif draw(st.booleans()):
        schedule = random_weights(schedule, order=draw(st.integers(1, 4)), seed=seed)
    return schedule


@settings(max_examples=40, deadline=None)
@given(weighted_schedules(), st.integers(1, 30))
def test_a_resampled_schedule_has_a_plan_that_reuses_as_the_original(schedule: Schedule, steps: int) -> None:
    """What is stored may differ: near the end, and where other rows follow."""
    captured = captured_once()
    original, made = build_plan(captured, schedule), build_plan(captured, schedule.resample(steps))
    check_plan(made)
    assert {pattern.reuse for pattern in made.patterns} <= {pattern.reuse for pattern in original.patterns}


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("periods", [2, 5, 14])
def test_whole_periods_have_the_patterns_of_the_original(captured: CapturedGraph, k: int, periods: int) -> None:
    schedule = Schedule.every(k, steps=4 * k, sites=SITES).with_taylor()
    original, made = (build_plan(captured, each) for each in (schedule, schedule.resample(periods * k)))
    assert set(made.patterns) == set(original.patterns)
