"""A stream that can run all steps of a run as one graph.

Nobody gets control within such a run: the model, the request and the timesteps are those that it began with. So the
host copies inputs, launches the prologue and one graph, and copies the result, whatever the number of steps.

The first runs go step by step. Once all their step programs are graphs (which `graphs="auto"` has measured), the
launches of a run are recorded in one piece: of each step the input of the model, the step program, and the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.execute.forecast import Timesteps
from harmonica_rt.execute.graph_replay import Recordable
from harmonica_rt.execute.graphed_stream import GraphedStream
from harmonica_rt.execute.sampler import Sampler, prediction_of
from harmonica_rt.execute.sampler_state import SamplerState
from harmonica_rt.graph.layout import distinct
from harmonica_rt.indices import StepIndex

MAX_STEPS = 128  # of a run that is recorded in one piece
MAX_SAMPLERS = 4  # kinds of sampler per stream whose graphs are kept; a graph of a run has all launches of all steps


class WholeRunStream(GraphedStream):
    """A stream that replays one graph per step or, where the caller leaves the sampler to it, one per run."""

    def run_whole(self, call: Call, sampler: Sampler, *, catch_up: bool) -> torch.Tensor | None:
        """See `RunsWhole.run_whole`."""
        with self._launches.turn(self._tensors):
            return self._run_whole(call, sampler, catch_up)

    def _run_whole(self, call: Call, sampler: Sampler, catch_up: bool) -> torch.Tensor | None:
        memory, plan = self._memory, self.lowered.plan
        steps = [StepIndex(step) for step in range(sampler.first, len(plan.steps))]
        if len(steps) > MAX_STEPS:
            return None
        weights = memory.weights
        if weights is not None and (catch_up or not weights.lies_on(memory.counter.device)):
            return None  # steps after the first, too, may lack values of weighted sums
        self.parameters.of(self.lowered.program(steps[0]))  # first: if parameters have moved, this drops the graphs
        state = self._state(sampler)
        numbers = {plan.addressed_programs[step] for step in steps[catch_up:]}
        if not memory.graphs.consists_of_graphs(state, numbers, entirely=not catch_up):
            return None
        memory.leaves.put(call.leaves)
        memory.counter.begin(steps[0])
        state.load(sampler)
        latents, timestep = map(call.paths.index, sampler.arguments)
        if self._prologue is not None and not self._prologue.prepare_run(self._timesteps(timestep, state)):
            return None
        given = memory.leaves.tensors[latents], memory.leaves.tensors[timestep]

        def body() -> tuple[Any, ...]:
            self._launch_all(steps, state, given, catch_up)
            return (state.result(),)

        def recordable() -> Recordable:
            programs = {self._program(step, catch_up=catch_up and step == steps[0])[0] for step in steps}
            parts = tuple(program.step for program in programs)
            return Recordable("a run", state, parts, body, lambda: memory.counter.set(steps[0]), measured=False)

        (result,) = memory.graphs.run(state, recordable)
        memory.counter.end(steps[-1])
        return result  # type: ignore[no-any-return]

    def _launch_all(
        self,
        steps: Sequence[StepIndex],
        state: SamplerState,
        given: tuple[torch.Tensor | None, torch.Tensor | None],
        catch_up: bool,
    ) -> None:
        """Launch all steps; `given` is where the model takes latents and timestep from, None for what it ignores."""
        latents, timestep = given
        for row, step in enumerate(steps):
            program, slots = self._program(step, catch_up=catch_up and row == 0)
            if latents is not None:
                state.model_input(row, out=latents)
            if timestep is not None:
                distinct(timestep).copy_(distinct(state.timestep(row), timestep))
            outputs = self._launch(program, self.parameters.of(program), slots)
            if self._debug:
                self.buffers.poison_dead(step)
            state.advance(row, prediction_of(self.lowered.nested(outputs)))

    def _state(self, sampler: Sampler) -> SamplerState:
        """The memory of samplers of this kind; that of the kind unused for longest goes, and its graph with it."""
        memory, kind = self._memory, sampler.kind
        state = memory.samplers.pop(kind, None)
        if state is None:
            state = SamplerState(sampler)
            state.rehearse()
        memory.samplers[kind] = state
        if len(memory.samplers) > MAX_SAMPLERS:
            memory.graphs.forget(memory.samplers.pop(next(iter(memory.samplers))))
        return state

    def _timesteps(self, own: int, state: SamplerState) -> Timesteps:
        """The timesteps of all steps, `[steps, ...]` for each timestep argument; `own` is the leaf of the sampler's."""
        leaves = self._memory.leaves.tensors
        numbers = self._prologue.timesteps if self._prologue is not None else ()
        found = {number: leaves[number] for number in numbers}
        return tuple(
            state.timesteps if number == own else leaf.expand(len(state.timesteps), *leaf.shape)
            for number, leaf in found.items()
            if leaf is not None
        )
