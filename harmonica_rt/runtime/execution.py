"""A plan at work: lowered programs, the weights of the current run, and streams that run them step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmonica_rt.capture.call import Call
from harmonica_rt.capture.roles import Role
from harmonica_rt.indices import ProgramId, SlotId, StepIndex
from harmonica_rt.lower import Lowering, lower
from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.plan import Plan
from harmonica_rt.runtime.buffers import SlotBuffers
from harmonica_rt.runtime.prologue import LoweredPart, LoweredPrologue, StreamPrologue

Weights = Callable[[], Mapping[str, torch.Tensor]]


class PlanRuntime:
    """A plan, lowered, with the weights of the current run and the arenas of its streams.

    Args:
        plan: the plan.
        weights: gives the model's parameters and buffers by name; asked once a run.
        leaf_roles: of the leaves of its calls.
        lowering: one of `harmonica_rt.lower.LOWERINGS`.
        debug: fill slots with NaN before they are written and after their last read.
    """

    def __init__(self, plan: Plan, weights: Weights, leaf_roles: Sequence[Role], *, lowering: str, debug: bool) -> None:
        self.plan = plan
        self.debug = debug
        started = time.perf_counter()
        self.lowered: Lowering = lower(lowering, plan, leaf_roles)
        prologue = self.lowered.prologue
        self._prologue = (
            LoweredPrologue(prologue, plan.captured.root, len(plan.steps)) if prologue is not None else None
        )
        self.lower_seconds = time.perf_counter() - started
        self.compile_seconds = 0.0  # from the call to the plan, checks included; set by who made it
        self._catch_up: dict[StepIndex, tuple[Program, tuple[SlotId, ...]]] = {}
        self._fetch_weights = weights
        self._weights: Mapping[str, torch.Tensor] | None = None
        self._bound: dict[Program | LoweredPart, tuple[Any, ...]] = {}
        self._free: list[SlotBuffers] = []
        self._lent: list[SlotBuffers] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes of all arenas held now: one set for each stream that ran at once."""
        return sum(buffers.nbytes for buffers in (*self._free, *self._lent))

    def begin_run(self) -> None:
        """Take back all arenas; fetch the weights anew at their first use."""
        self._free, self._lent = [*self._lent, *self._free], []
        self._weights = None
        self._bound.clear()

    def new_stream(self) -> PlanStream:
        """A stream with an arena of its own."""
        buffers = self._free.pop() if self._free else SlotBuffers(self.plan)
        self._lent.append(buffers)
        if self.debug:
            buffers.poison_all()
        prologue = StreamPrologue(self._prologue, self.bound) if self._prologue is not None else None
        return PlanStream(self, buffers, prologue)

    def program(self, index: ProgramId) -> Program:
        """A lowered step program."""
        return self.lowered.programs[index]

    def catch_up(self, step: StepIndex) -> tuple[Program, tuple[SlotId, ...]]:
        """The program that computes `step` in full, and the slots it fills."""
        if step not in self._catch_up:
            graph, slots = self.plan.catch_up_graph(step)
            self._catch_up[step] = self.lowered.program(graph), slots
        return self._catch_up[step]

    def bound(self, program: Program | LoweredPart) -> tuple[Any, ...]:
        """The weights and constants of `program`, as the model holds them in this run."""
        bound = self._bound.get(program)
        if bound is None:
            if self._weights is None:
                self._weights = self._fetch_weights()
            bound = self._bound[program] = program.bind(self._weights, self.plan.captured.constants)
        return bound


class PlanStream:
    """A stream that runs step programs over one set of slots, and what was computed for them beforehand."""

    def __init__(self, runtime: PlanRuntime, buffers: SlotBuffers, prologue: StreamPrologue | None) -> None:
        self.runtime = runtime
        self.buffers = buffers
        self.prologue = prologue

    def begin(self) -> None:
        """See `Stream.begin`."""
        if self.prologue is not None:
            self.prologue.begin()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        runtime = self.runtime
        entry = runtime.plan.steps[step]
        if catch_up:
            program, writes = runtime.catch_up(step)
            reads: tuple[SlotId, ...] = ()
        else:
            program, reads, writes = runtime.program(entry.program), entry.reads, entry.writes
        slots = self.buffers.slots
        hoisted = self.prologue.at(step, call) if self.prologue is not None else {}
        outputs = program(
            runtime.bound(program),
            call.leaves,
            [slots[slot] for slot in reads],
            [slots[slot] for slot in writes],
            [hoisted[name] for name in program.step.hoisted],
        )
        if runtime.debug:
            self.buffers.poison_dead(step)
        return pytree.tree_unflatten(outputs, runtime.plan.captured.out_spec)
