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
        hoisted = self._prologue.at(step, call) if self._prologue is not None else {}
        program, slots = self._program(step, catch_up=catch_up)
        given = [hoisted[name] for name in program.step.hoisted]
        return program(self.parameters.of(program), call.leaves, *slots, given)
