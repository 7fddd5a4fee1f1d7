"""CUDA streams and events of the double, and the order of launches that they make."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

Seen = Counter["DoubleStream"]  # how many launches of each stream are over


class DoubleStream:
    """A CUDA stream; `seen` holds how far it waited for each other one."""

    def __init__(self, calls: list[str], host: Seen) -> None:
        self._calls = calls
        self._host = host
        self.seen: Seen = Counter()
        self.recording: Any = None  # the graph
        self.invalid = False

    def wait_stream(self, other: DoubleStream) -> None:
        self.seen |= other.seen

    def wait_event(self, event: DoubleEvent) -> None:
        self._calls.append("wait_event")
        self.seen |= event.seen

    def launch(self) -> int:
        """Count a launch; returns its number on this stream."""
        self.seen |= self._host
        self.seen[self] += 1
        return self.seen[self]

    def refuse(self, message: str = "operation not permitted when stream is capturing") -> None:
        """Fail what may not happen while recording; the recording is spoilt."""
        self.invalid = True
        raise RuntimeError(message)


class DoubleEvent:
    """An event: what a stream had seen when it was recorded."""

    def __init__(self) -> None:
        self.seen: Seen = Counter()

    def record(self, stream: DoubleStream) -> None:
        self.seen = stream.seen.copy()


class Accesses:
    """The last launches that wrote and read each piece of memory, by stream."""

    def __init__(self, faults: list[str]) -> None:
        self._faults = faults
        self._last: dict[int, tuple[Seen, Seen]] = {}  # address -> writes, reads

    def begin(self, tensor: torch.Tensor, stream: DoubleStream, number: int) -> None:
        """Note fresh memory, written by this launch."""
        self._last[tensor.untyped_storage().data_ptr()] = Counter({stream: number}), Counter()

    def add(self, tensor: torch.Tensor, stream: DoubleStream, number: int, *, writes: bool, by: object) -> None:
        """Note an access by a launch, and a fault if another stream is not known to be done with this memory."""
        written, read = self._last.setdefault(tensor.untyped_storage().data_ptr(), (Counter(), Counter()))
        earlier = written | read if writes else written
        if any(stream.seen[other] < count for other, count in earlier.items() if other is not stream):
            self._faults.append(f"{by} {'writes' if writes else 'reads'} what another stream is not done with")
        (written if writes else read)[stream] = number
