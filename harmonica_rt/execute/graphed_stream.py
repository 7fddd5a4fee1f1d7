"""A stream whose steps are graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.execute.cuda_graphs import Body
from harmonica_rt.execute.graph_memory import GraphMemory
from harmonica_rt.execute.graph_replay import Recordable
from harmonica_rt.execute.graphed_prologue import GraphedPrologue
from harmonica_rt.execute.launch_order import LaunchOrder
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.parameter_binding import ParameterBinding
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.execute.slot_buffers import SlotBuffers, StepSlots
from harmonica_rt.indices import StepIndex
from harmonica_rt.lower.faster_of_two import Faster
from harmonica_rt.lower.plain import Program


class GraphedStream(PlanStream[GraphedPrologue]):
    """A stream that replays one graph per step.

    Args:
        lowered, parameters, launches, buffers, debug: see `PlanStream`.
        prologue: the hoisted values of this stream; None where nothing is hoisted.
        memory: the graphs, and what they read and write besides slots.
    """

    def __init__(
        self,
        lowered: LoweredPlan,
        parameters: ParameterBinding,
        launches: LaunchOrder,
        buffers: SlotBuffers,
        prologue: GraphedPrologue | None,
        *,
        memory: GraphMemory,
        debug: bool,
    ) -> None:
        super().__init__(lowered, parameters, launches, buffers, prologue, debug=debug)
        self._memory = memory

    def begin(self) -> None:
        """See `Stream.begin`."""
        self._memory.leaves.begin()
        super().begin()

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from super()._tensors()
        yield from self._memory.tensors

    def _run(self, step: StepIndex, call: Call, *, catch_up: bool) -> tuple[Any, ...]:
        memory = self._memory
        memory.leaves.put(call.leaves)
        memory.counter.begin(step)
        if self._prologue is not None:
            self._prologue.prepare(step)
        if memory.weights is not None:
            memory.weights.load_elsewhere(step, memory.counter)
        program, slots = self._program(step, catch_up=catch_up)
        bound = self.parameters.of(program)  # first: if parameters have moved, this drops the graphs
        if catch_up:
            outputs = self._launch(program, bound, slots)
        else:
            number = self.lowered.plan.addressed_programs[step]
            outputs = memory.graphs.run(number, lambda: self._recordable(step, program, bound, slots))
        memory.counter.end(step)
        return outputs

    def _recordable(self, step: StepIndex, program: Program, bound: tuple[Any, ...], slots: StepSlots) -> Recordable:
        def body(program: Program) -> Body:
            return lambda: self._launch(program, bound, slots)

        undecided = program if isinstance(program, Faster) and program.chosen is None else None
        return Recordable(
            name="a step program",
            owner=program,
            parts=(program.step,),
            body=body(program),
            restore=lambda: self._memory.counter.set(step),
            candidates=(body(undecided.first), body(undecided.second)) if undecided is not None else (),
            choose=undecided.choose if undecided is not None else None,
        )

    def _launch(self, program: Program, bound: tuple[Any, ...], slots: StepSlots) -> tuple[Any, ...]:
        """Launch what computes the step that the counter holds."""
        memory = self._memory
        if self._prologue is not None:
            self._prologue.load()
        known = memory.hoisted.tensors
        if memory.weights is not None:
            memory.weights.load(memory.counter)
            known = {**known, **memory.weights.tensors}
        given = [known[name] for name in program.step.hoisted]
        outputs = program(bound, memory.leaves.tensors, *slots, given)
        memory.counter.advance()
        return outputs
