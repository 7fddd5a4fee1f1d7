"""Builds a `Plan` for one call signature: the step graphs, the table from steps to step graphs, and the slots."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import ScheduleMismatchError
from harmonica_rt.graph import flops
from harmonica_rt.indices import ProgramId, SiteIndex, SlotId, StepIndex
from harmonica_rt.plan.histories import Histories, histories
from harmonica_rt.plan.liveness import Lifetime, analyse
from harmonica_rt.plan.slots import SlotTable, Value, place, placed
from harmonica_rt.plan.specialise import Pattern, specialise
from harmonica_rt.plan.step_graph import StepGraph
from harmonica_rt.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One step: the index of its step graph, and the slots of that graph's reads and stores, in the graph's order."""

    program: ProgramId
    reads: tuple[SlotId, ...]
    writes: tuple[SlotId, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule made concrete for one captured graph.

    Attributes:
        captured: the graph that all step graphs come from.
        schedule: the schedule that the plan implements.
        programs: one step graph for each distinct pattern; lowering makes a program of each.
        patterns: the pattern of each step graph.
        steps: one entry per step.
        table: where every stored value lives.
        seconds: wall time of planning, excluding the capture.
    """

    captured: CapturedGraph
    schedule: Schedule
    programs: tuple[StepGraph, ...]
    patterns: tuple[Pattern, ...]
    steps: tuple[Step, ...]
    table: SlotTable
    seconds: float

    def catch_up_graph(self, step: StepIndex) -> tuple[StepGraph, tuple[SlotId, ...]]:
        """A step graph that computes everything in `step` and fills every slot that a later step may read.

        It is for a stream that missed an earlier step, and so lacks values that the schedule expects in its slots. A
        value computed later than the schedule says replaces a missing one where it is reused as it is, but not in a
        weighted sum. Returns the step graph and the slot for each of its stores.
        """
        weighted = histories(self.schedule).taken
        alive = {
            slot.value.output: slot.id
            for slot in self.table.slots
            if slot.value.first <= step < slot.value.last
            and (slot.value.first == step or not weighted[slot.value.output.site])
        }
        graph = specialise(self.captured, Pattern(frozenset(), frozenset(alive)))
        return graph, tuple(alive[output] for output in graph.stores)

    @functools.cached_property
    def addressed_programs(self) -> tuple[int, ...]:
        """For each step, the number of its (program, slot addresses) pair, in the order in which they first occur."""
        slots = self.table.slots
        pairs = [(step.program, *(slots[slot].offset for slot in (*step.reads, *step.writes))) for step in self.steps]
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        return tuple(numbers[pair] for pair in pairs)

    @property
    def programs_with_addresses(self) -> int:
        """Number of (program, slot addresses) pairs: what a backend that bakes addresses in would compile."""
        return len(set(self.addressed_programs))

    @functools.cached_property
    def node_flops(self) -> dict[str, int]:
        """FLOPs by node of the captured graph."""
        return flops.count_nodes(self.captured.graph)

    @functools.cached_property
    def program_flops(self) -> tuple[int, ...]:
        """FLOPs of each program, per call."""
        return tuple(flops.total(program.graph, self.node_flops) for program in self.programs)

    @functools.cached_property
    def full_flops(self) -> int:
        """FLOPs of one call of the uncached model."""
        return sum(self.node_flops.values())

    @property
    def theoretical_speedup(self) -> float:
        """FLOPs of an uncached run / FLOPs of this plan's run. 1.0 where the model does no counted FLOPs."""
        left = sum(self.program_flops[step.program] for step in self.steps)
        return self.full_flops * len(self.steps) / left if left else 1.0


def build_plan(captured: CapturedGraph, schedule: Schedule, *, offsets: Sequence[int] | None = None) -> Plan:
    """Specialise the captured graph, place the slots, and assign each step its step graph.

    Args:
        captured: the model's captured graph.
        schedule: which sites to reuse in which step.
        offsets: byte offsets of the slots, as found for an earlier plan; None searches for them.

    Raises:
        ScheduleMismatchError: the schedule and the captured graph do not have the same sites in the same order, or a
            weighted site gives something else than floating-point numbers.
        InvariantError: the number of offsets is not the number of slots.
    """
    if schedule.sites != captured.sites:
        raise ScheduleMismatchError("the schedule and the captured graph do not have the same sites in the same order")
    started = time.perf_counter()
    history = histories(schedule)
    _check_weighted(captured, history)
    rows, lifetimes = analyse(captured, schedule)
    distinct = list(dict.fromkeys(rows))
    programs = [specialise(captured, pattern) for pattern in distinct]
    values = [_value(captured, lifetime) for lifetime in lifetimes]
    table = place(values) if offsets is None else placed(values, offsets)
    slot_of = {(lifetime.output, lifetime.first): SlotId(slot) for slot, lifetime in enumerate(lifetimes)}
    steps = []
    for index, row in enumerate(rows):
        program = ProgramId(distinct.index(row))
        graph = programs[program]
        steps.append(
            Step(
                program,
                tuple(slot_of[o, history.source(StepIndex(index), o.site, age)] for o, age in graph.reads),
                tuple(slot_of[output, StepIndex(index)] for output in graph.stores),
            )
        )
    return Plan(
        captured,
        schedule,
        tuple(programs),
        tuple(distinct),
        tuple(steps),
        table,
        time.perf_counter() - started,
    )


def _check_weighted(captured: CapturedGraph, history: Histories) -> None:
    for site in np.flatnonzero(history.taken):
        for node in captured.outputs_of(SiteIndex(int(site))):
            dtype = node.meta["val"].dtype
            if not dtype.is_floating_point:
                raise ScheduleMismatchError(f"{captured.sites[site]} gives {dtype}, which cannot be weighted")


def _value(captured: CapturedGraph, lifetime: Lifetime) -> Value:
    fake = captured.cached_value(captured.outputs_of(lifetime.output.site)[lifetime.output.output])
    return Value(
        lifetime.output,
        lifetime.first,
        lifetime.last,
        tuple(fake.shape),
        tuple(fake.stride()),
        fake.dtype,
        fake.device,
    )
