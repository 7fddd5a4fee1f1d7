"""A stream for a model whose graph depends on values of the request, such as the length of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.capture.request_values import RequestValues
from harmonica_rt.engine import Stream
from harmonica_rt.execute.sampler import RunsWhole, Sampler
from harmonica_rt.indices import StepIndex

HeldStream = tuple[Stream, RequestValues | None]  # a stream and the request values it holds for; None for all
StreamFor = Callable[[Call], HeldStream]


class RequestValueStream:
    """A stream over plans that hold only for requests with certain values: those that the model read at capture.

    Args:
        stream_for: makes a stream for a call, with the request values that it holds for.
        stream: the stream of the first request.
        values: the request values that it holds for.
    """

    def __init__(self, stream_for: StreamFor, stream: Stream, values: RequestValues) -> None:
        self._stream_for = stream_for
        self._held: list[HeldStream] = [(stream, values)]  # the one in use first
        self._chosen = True  # whether the stream in use is known to hold for the current request
        self._begun = False

    @property
    def in_use(self) -> Stream:
        """The stream of the current request."""
        return self._held[0][0]

    def begin(self) -> None:
        """See `Stream.begin`."""
        self.in_use.begin()
        self._chosen = not self._begun  # the first request is the one that the stream was made for
        self._begun = True

    def end(self) -> None:
        """See `Stream.end`."""
        self.in_use.end()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        if not self._chosen:
            self._choose(call)
        return self.in_use.run(step, call, catch_up=catch_up)

    def run_whole(self, call: Call, sampler: Sampler, *, catch_up: bool) -> torch.Tensor | None:
        """See `RunsWhole.run_whole`."""
        if not self._chosen:
            self._choose(call)
        stream = self.in_use
        return stream.run_whole(call, sampler, catch_up=catch_up) if isinstance(stream, RunsWhole) else None

    def _choose(self, call: Call) -> None:
        """Switch to the stream that holds for the values of this request."""
        self._chosen = True
        fitting = next((one for one in self._held if one[1] is None or one[1].hold(call.leaves)), None)
        if fitting is self._held[0]:
            return
        self.end()
        if fitting is None:
            self._held.insert(0, self._stream_for(call))
        else:
            self._held.remove(fitting)
            self._held.insert(0, fitting)
            fitting[0].begin()
