"""Checks the rules that every plan keeps. Each plan is checked before it runs; a breach is a defect of this package.

1. The schedule and the step table agree: a step's program reuses exactly the sites that the schedule reuses.
2. Every slot that a step reads was stored by the step whose value the schedule takes there.
3. Nothing is stored that no later step reads.
4. Slots of one device that are alive in the same step do not overlap; all slots lie inside their arena and are aligned.
5. A slot has the shape, strides, dtype and device of the placeholder or value it is bound to.
6. Step graphs hold no mutating operator and no node without users (`check_step_graph`).
7. The arena is no smaller than the lower bound, and equal to it where all slots have one size. It is no larger than
   all slots together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import fx

from harmonica_rt.errors import InvariantError
from harmonica_rt.indices import SlotId, StepIndex
from harmonica_rt.plan.histories import histories
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.slots import ALIGNMENT, Slot
from harmonica_rt.plan.step_graph import check_step_graph


def check_plan(plan: Plan) -> None:
    """Raise InvariantError at the first rule that `plan` breaks."""
    for program in plan.programs:
        check_step_graph(program)
    _check_steps(plan)
    _check_reads_and_stores(plan)
    _check_memory(plan)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantError(what)


def _check_steps(plan: Plan) -> None:
    _require(
        len(plan.steps) == plan.schedule.steps,
        f"the plan has {len(plan.steps)} steps, its schedule {plan.schedule.steps}",
    )
    for index, step in enumerate(plan.steps):
        reused = frozenset(i for i, computed in enumerate(plan.schedule.compute[index]) if not computed)
        _require(
            plan.patterns[step.program].reuse == reused,
            f"step {index}: the program and the schedule reuse different sites",
        )
        program = plan.programs[step.program]
        _require(len(step.reads) == len(program.reads), f"step {index}: its reads and their slots differ in number")
        _require(len(step.writes) == len(program.stores), f"step {index}: its stores and their slots differ in number")
        _check_layout(plan, index, zip(step.reads, program.read_nodes, strict=True))
        _check_layout(plan, index, zip(step.writes, program.stored_nodes, strict=True))


def _check_layout(plan: Plan, step: int, bound: Iterable[tuple[SlotId, fx.Node]]) -> None:
    for slot, node in bound:
        value, fake = plan.table.slots[slot].value, node.meta["val"]
        _require(
            (value.shape, value.stride, value.dtype, value.device)
            == (tuple(fake.shape), tuple(fake.stride()), fake.dtype, fake.device),
            f"step {step}: slot {slot} has another layout than {node.name}",
        )


def _check_reads_and_stores(plan: Plan) -> None:
    history = histories(plan.schedule)
    stored_in: dict[SlotId, int] = {}
    read: set[SlotId] = set()
    for index, step in enumerate(plan.steps):
        program = plan.programs[step.program]
        for (output, age), slot in zip(program.reads, step.reads, strict=True):
            value = plan.table.slots[slot].value
            _require(value.output == output, f"step {index} reads {output} from the slot of {value.output}")
            _require(slot in stored_in, f"step {index} reads slot {slot}, which nothing stored before")
            due = history.source(StepIndex(index), output.site, age)
            stale = f"step {index} reads slot {slot}, stored in step {stored_in[slot]} and not in step {due}"
            _require(stored_in[slot] == due, stale)
            _require(index <= value.last, f"step {index} reads slot {slot}, which is freed after step {value.last}")
            read.add(slot)
        for output, slot in zip(program.stores, step.writes, strict=True):
            value = plan.table.slots[slot].value
            _require(value.output == output, f"step {index} stores {output} into the slot of {value.output}")
            _require(value.first == index, f"step {index} stores slot {slot}, which step {value.first} should store")
            stored_in[slot] = index
    for planned in plan.table.slots:
        _require(planned.id in stored_in, f"slot {planned.id} is never stored")
        _require(planned.id in read, f"slot {planned.id} is stored and never read")


def _check_memory(plan: Plan) -> None:
    for device, size in plan.table.arena_bytes.items():
        slots = [slot for slot in plan.table.slots if slot.value.device == device]
        for slot in slots:
            _require(slot.offset % ALIGNMENT == 0, f"slot {slot.id} is not aligned")
            _require(0 <= slot.offset <= size - slot.value.size, f"slot {slot.id} lies outside its arena")
        for step in range(len(plan.steps)):
            alive = [slot for slot in slots if slot.value.first <= step <= slot.value.last]
            _check_disjoint(alive, step)
        bound = plan.table.lower_bound[device]
        _require(size >= bound, f"an arena of {size} bytes cannot hold the {bound} bytes alive at once")
        if len({slot.value.size for slot in slots}) == 1:
            _require(size == bound, f"slots of one size take {size} bytes where {bound} are enough")
        total = sum(slot.value.size for slot in slots)
        _require(size <= total, f"an arena of {size} bytes for slots of {total} bytes in all")


def _check_disjoint(alive: list[Slot], step: int) -> None:
    ordered = sorted(alive, key=lambda slot: slot.offset)
    for a, b in itertools.pairwise(ordered):
        _require(a.offset + a.value.size <= b.offset, f"step {step}: slots {a.id} and {b.id} overlap")
