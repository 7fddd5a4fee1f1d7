"""A stream: runs step programs on one set of slots and on the values hoisted for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call
from harmonica_rt.execute.arena_pool import StreamMemory
from harmonica_rt.execute.launch_order import LaunchOrder
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.parameter_binding import ParameterBinding
from harmonica_rt.execute.stream_prologue import StreamPrologue
from harmonica_rt.indices import StepIndex


class PlanStream:
    """A stream of a plan; see `harmonica_rt.engine.Stream`.

    Args:
        lowered: the plan.
        parameters: what its programs are bound to.
        launches: the order of launches on memory that outlives a call.
        memory: slots, and what belongs to them, for this stream alone.
        prologue: the hoisted values of this stream; None where nothing is hoisted.
        debug: fill slots with NaN after their last read.
    """

    def __init__(
        self,
        lowered: LoweredPlan,
        parameters: ParameterBinding,
        launches: LaunchOrder,
        memory: StreamMemory,
        prologue: StreamPrologue | None,
        *,
        debug: bool,
    ) -> None:
        self.lowered = lowered
        self.buffers = memory.buffers
        self.parameters = parameters
        self._launches = launches
        self._memory = memory
        self._prologue = prologue
        self._debug = debug

    def begin(self) -> None:
        """See `Stream.begin`."""
        if self._prologue is not None:
            self._prologue.begin()

    def end(self) -> None:
        """See `Stream.end`."""
        self.parameters.end_run()
        if self._prologue is not None:
            with self._launches.turn(self._tensors):
                self._prologue.end()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        with self._launches.turn(self._tensors):
            return self._run(step, call, catch_up=catch_up)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._memory.tensors()
        if self._prologue is not None:
            yield from self._prologue.tensors()

    def _run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        lowered, leaves, graphs = self.lowered, call.leaves, self._memory.graphs
        hoisted = self._prologue.at(step, call) if self._prologue is not None else {}
        slots: tuple[list[torch.Tensor], list[torch.Tensor]]
        if catch_up:
            program, filled = lowered.catch_up(step)
            slots = [], [self.buffers.slots[slot] for slot in filled]
        else:
            program, slots = lowered.program(step), self.buffers.steps[step]
        bound = self.parameters.of(program)
        if graphs is not None and not catch_up:
            number = lowered.plan.addressed_programs[step]
            outputs = graphs.run(number, program, bound, leaves, slots, hoisted)
        else:
            outputs = program(bound, leaves, *slots, [hoisted[name] for name in program.step.hoisted])
        if self._debug:
            self.buffers.poison_dead(step)
        return pytree.tree_unflatten(outputs, lowered.plan.captured.out_spec)
