"""What every stream of a plan has: slots, parameters, a prologue, and turns on the memory that outlives a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.execute.launch_order import LaunchOrder
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.parameter_binding import ParameterBinding
from harmonica_rt.execute.slot_buffers import SlotBuffers, StepSlots
from harmonica_rt.indices import StepIndex
from harmonica_rt.lower.plain import Program


class HoistedInRun(Protocol):
    """The hoisted values of one stream in one run."""

    def begin(self) -> None:
        """The next call belongs to another request."""

    def end(self) -> None:
        """The run is over: learn its timesteps.

        Raises:
            RunError: the run was computed with other timesteps.
        """

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it keeps between calls."""


H = TypeVar("H", bound=HoistedInRun)


class PlanStream(ABC, Generic[H]):
    """A stream of a plan; see `harmonica_rt.engine.Stream`.

    Args:
        lowered: the plan.
        parameters: what its programs are bound to.
        launches: the order of launches on memory that outlives a call.
        buffers: the slots of this stream.
        prologue: the hoisted values of this stream; None where nothing is hoisted.
        debug: fill slots with NaN after their last read.
    """

    def __init__(
        self,
        lowered: LoweredPlan,
        parameters: ParameterBinding,
        launches: LaunchOrder,
        buffers: SlotBuffers,
        prologue: H | None,
        *,
        debug: bool,
    ) -> None:
        self.lowered = lowered
        self.buffers = buffers
        self.parameters = parameters
        self._launches = launches
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
            outputs = self._run(step, call, catch_up=catch_up)
            if self._debug:
                self.buffers.poison_dead(step)
        return self.lowered.nested(outputs)

    @abstractmethod
    def _run(self, step: StepIndex, call: Call, *, catch_up: bool) -> tuple[Any, ...]:
        """Launch a step; return the flat outputs."""

    def _tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that outlive a call, each storage at least once."""
        yield from self.buffers.arenas.values()
        if self._prologue is not None:
            yield from self._prologue.tensors()

    def _program(self, step: StepIndex, *, catch_up: bool) -> tuple[Program, StepSlots]:
        """The program of a step, and the slots that it reads and writes."""
        if not catch_up:
            return self.lowered.program(step), self.buffers.steps[step]
        program, filled = self.lowered.catch_up(step)
        return program, ([], [self.buffers.slots[slot] for slot in filled])
