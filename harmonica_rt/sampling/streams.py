"""The streams of one run: which of them continues with a call.

Guidance may call twice per step, skip-layer guidance a third time at some steps, and a callback may shrink the batch
mid-run. So a call belongs to the k-th stream of its step with its signature and conditioning. Streams that no call
continues are kept for a while, in case their conditioning or the model's state comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from harmonica_rt.call.call import Call
from harmonica_rt.engine import Engine
from harmonica_rt.errors import RunError
from harmonica_rt.indices import StepIndex
from harmonica_rt.sampling.features import RunStream, StepTables
from harmonica_rt.sampling.notices import Notices

log = logging.getLogger(__name__)

MAX_IDLE_STREAMS = 3  # kept in case their conditioning returns; each has its own slots
MAX_IDLE_STATES = 3  # states of the model whose streams are kept in case the state returns


class RunStreams:
    """The streams of one run over one engine.

    Args:
        engine: makes the streams.
        tables: what the schedule says about each step.
        notices: receives a notice when an argument changes at every step.
    """

    def __init__(self, engine: Engine, tables: StepTables, notices: Notices) -> None:
        self._engine = engine
        self._tables = tables
        self._notices = notices
        self._streams: list[RunStream] = []
        self._errors: list[RunError] = []  # of streams that were dropped
        self._changed_in: dict[str, StepIndex] = {}  # conditioning -> the step at which its value changed

    def end(self) -> list[RunError]:
        """The run is over: the errors of all its streams, those dropped before included."""
        return [*self._errors, *_end_all(self._streams)]

    def drop(self) -> None:
        """Forget all streams, whose memory others may need."""
        self._streams.clear()

    def stream_for(self, call: Call, step: StepIndex, order: int, model_state: object) -> tuple[RunStream, int]:
        """The stream that continues with a call in `step`, and the last step that it ran before; notes that it runs it.

        Args:
            call: the call.
            step: the step that the call is in.
            order: the number of calls before it in that step.
            model_state: the state of the model that it is to run for.
        """
        open_streams = [
            s
            for s in self._streams
            if s.last_step != step and s.signature == call.signature and s.model_state is model_state
        ]
        open_streams.sort(key=lambda s: (s.order != order, s.order))
        stream = next((s for s in open_streams if s.conditioning.recognises(call)), None)
        if stream is None:
            stream = self._by_values(call, step, order, open_streams, model_state)
        before = stream.last_step
        stream.last_step = step
        return stream, before

    def _by_values(
        self, call: Call, step: StepIndex, order: int, open_streams: list[RunStream], model_state: object
    ) -> RunStream:
        """As `stream_for`, when no stream recognises the call: compares values, which waits for the device."""
        changed = {id(s): s.conditioning.changed(call) for s in open_streams}
        stream = next((s for s in open_streams if not changed[id(s)]), None)
        if stream is not None:
            stream.conditioning.advance(call)
            return stream
        before = next((s for s in open_streams if s.last_step == step - 1), None)
        if before is not None:
            self._note_changes(changed[id(before)], step)
        if len(open_streams) >= MAX_IDLE_STREAMS:  # the one that is idle for longest begins anew, in the same memory
            stream = min(open_streams, key=lambda s: s.last_step)
            stream.begin(call, order)
            return stream
        return self._open(call, step, order, model_state)

    def _note_changes(self, names: list[str], step: StepIndex) -> None:
        """Warn if the same arguments change at every step: then nothing can ever be reused."""
        again = [name for name in names if self._changed_in.get(name) == step - 1]
        self._changed_in.update(dict.fromkeys(names, step))
        if again:
            self._notices.say(
                "arguments that change",
                "%s changes from step to step. By its name it belongs to the request (as a prompt does), so each "
                "change begins a new request and nothing is reused across it: pass the same values in every step of a "
                "run. Arguments that change with the latents are recognised by names such as noisy_..., timesteps by "
                "names such as ..._timestep",
                ", ".join(again),
            )

    def _open(self, call: Call, step: StepIndex, order: int, model_state: object) -> RunStream:
        for other in self._streams:
            if other.last_step == step - 1 and (changed := call.plain_difference(other.signature)):
                log.warning(
                    "%s changes from step to step: each value makes a plan and a stream of its own, and nothing is "
                    "reused across them. Pass numbers that change as tensors",
                    changed,
                )
        stream = RunStream(self._engine.new_stream(call), call, order, self._tables, model_state)
        self._streams = [*self._of_recent_states(model_state), stream]
        return stream

    def _of_recent_states(self, model_state: object) -> list[RunStream]:
        """All streams except those of model states that were left long ago, which it ends to free their slots."""
        recent = dict.fromkeys(id(s.model_state) for s in sorted(self._streams, key=lambda s: -s.last_step))
        kept = {id(model_state), *list(recent)[:MAX_IDLE_STATES]}
        self._errors += _end_all(s for s in self._streams if id(s.model_state) not in kept)
        return [s for s in self._streams if id(s.model_state) in kept]


def _end_all(streams: Iterable[RunStream]) -> list[RunError]:
    """End every stream, even if another one fails, since each learns from the run; return the errors."""
    errors = []
    for end in (end for stream in streams for end in (stream.conditioning.end, stream.stream.end)):
        try:
            end()
        except RunError as error:
            errors.append(error)
    return errors
