"""A stream whose steps are launched operator by operator."""

from __future__ import annotations

from typing import Any

from harmonica_rt.call.call import Call
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.execute.stream_prologue import StreamPrologue
from harmonica_rt.indices import StepIndex


class LaunchedStream(PlanStream[StreamPrologue]):
    """A stream that launches each operator of a step."""

    def _run(self, step: StepIndex, call: Call, *, catch_up: bool) -> tuple[Any, ...]:
        known = {name: table[step] for name, table in self.lowered.weights.items()}
        if self._prologue is not None:
            known.update(self._prologue.at(step, call))
        program, slots = self._program(step, catch_up=catch_up)
        given = [known[name] for name in program.step.hoisted]
        return program(self.parameters.of(program), call.leaves, *slots, given)
