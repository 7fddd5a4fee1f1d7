"""CUDA streams and events of the double, and the order of launches that they make."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.cuda_double.memory import Memory

if TYPE_CHECKING:
    from tests.cuda_double.queue import Launch, Queue

Seen = Counter["DoubleStream"]  # how many launches of each stream are over


class DoubleStream:
    """A CUDA stream; `seen` holds how far it waited for each other one."""

    def __init__(self, queue: Queue, calls: list[str], host: Seen) -> None:
        self.seen: Seen = Counter()
        self.recording: Any = None  # the graph
        self.invalid = False
        self.tail: tuple[Launch, ...] = ()  # what the next launch comes after
        self.freed: list[tuple[Memory, tuple[Launch, ...]]] = []  # memory for its next allocations, and until when not
        self._queue = queue
        self._calls = calls
        self._host = host

    def wait_stream(self, other: DoubleStream) -> None:
        """The launches from now on come after those of `other` so far."""
        self._wait(other.seen, other.tail, recorded=other.recording)

    def wait_event(self, event: DoubleEvent) -> None:
        """The launches from now on come after those that the event was recorded behind."""
        self._calls.append("wait_event")
        self._wait(event.seen, event.tail, recorded=event.recorded_in)

    def record_event(self, event: DoubleEvent | None = None) -> DoubleEvent:
        """An event behind the launches so far."""
        event = DoubleEvent() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits for the launches so far."""
        if self.recording is not None:
            self.refuse()
        with self._queue.lock:
            self._queue.run_until(self.tail)
            self._host |= self.seen

    def launch(self) -> int:
        """A launch; its number on this stream."""
        self.seen |= self._host
        self.seen[self] += 1
        return self.seen[self]

    def refuse(self, message: str = "operation not permitted when stream is capturing") -> None:
        """Fail what may not happen while recording; the recording is spoilt."""
        self.invalid = True
        raise RuntimeError(message)

    def _wait(self, seen: Seen, tail: tuple[Launch, ...], *, recorded: Any) -> None:
        if self.recording is not recorded:
            (self if self.recording is not None else recorded.stream).refuse(
                "dependency created on uncaptured work in another stream"
            )
        self.seen |= seen
        self.tail = tuple(dict.fromkeys((*self.tail, *tail)))


class Streams:
    """All CUDA streams, and the current one of each thread.

    Args:
        make: makes one.

    Attributes:
        default: the one that threads begin with.
        made: the others.
        most: how many there are at most: torch hands them out in turn.
    """

    def __init__(self, make: Callable[[], DoubleStream]) -> None:
        self.default = make()
        self.made: list[DoubleStream] = []
        self.most = 32
        self._make = make
        self._handed_out = itertools.count()
        self._here = threading.local()

    @property
    def current(self) -> DoubleStream:
        """That of this thread."""
        return getattr(self._here, "stream", self.default)

    @current.setter
    def current(self, stream: DoubleStream) -> None:
        self._here.stream = stream

    def next(self) -> DoubleStream:
        """What `torch.cuda.Stream()` gives."""
        place = next(self._handed_out) % self.most
        if place == len(self.made):
            self.made.append(self._make())
        return self.made[place]


class DoubleEvent:
    """An event: what a stream had seen when it was recorded."""

    def __init__(self, **_: Any) -> None:
        self.seen: Seen = Counter()
        self.tail: tuple[Launch, ...] = ()
        self.recorded_in: Any = None  # the graph that was being recorded

    def record(self, stream: DoubleStream) -> None:
        """Put it behind the launches of `stream` so far."""
        self.seen, self.tail, self.recorded_in = stream.seen.copy(), stream.tail, stream.recording


class Accesses:
    """Which launches use which memory, and whether they are ordered.

    Args:
        faults: takes a message for each pair of launches that may come in an order that they must not come in.
    """

    def __init__(self, faults: list[str]) -> None:
        self._faults = faults

    def add(self, memory: Memory, stream: DoubleStream, number: int, *, writes: bool, by: object) -> None:
        """An access by a launch; a fault where another stream is not known to be done with this memory."""
        verb = "writes" if writes else "reads"
        if memory.freed and memory.graph is None:  # a pool may hand out again what a graph left
            self._faults.append(f"{by} {verb} memory that was freed")
        earlier = memory.written | memory.read if writes else memory.written
        if _is_ahead(earlier, stream):
            self._faults.append(f"{by} {verb} what another stream is not done with")
        (memory.written if writes else memory.read)[stream] = number

    def reuse(self, memory: Memory, stream: DoubleStream) -> None:
        """Free memory is allocated again, on `stream`."""
        uses = memory.written | memory.read
        if _is_ahead(Counter({user: count for user, count in uses.items() if user not in memory.users}), stream):
            self._faults.append("memory is freed that another stream is not done with: record_stream was not called")


def _is_ahead(uses: Seen, stream: DoubleStream) -> bool:
    """Whether some of these launches may be running still when the next one of `stream` does."""
    return any(stream.seen[other] < count for other, count in uses.items() if other is not stream)
