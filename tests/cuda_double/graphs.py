"""CUDA graphs of the double: the launches of a recording, replayed on the very memory that they were recorded with."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tests.cuda_double.memory import Memory

if TYPE_CHECKING:
    from tests.cuda_double.double import CudaDouble
    from tests.cuda_double.streams import DoubleStream


@dataclass
class Work:
    """What a launch does, and to which memory.

    Attributes:
        run: does it.
        by: the operator, for messages.
        uses: the memory that it uses, with whether it writes there.
        made: memory that begins with it, and that nothing before can use.
    """

    run: Callable[[], object]
    by: object
    uses: list[tuple[Memory, bool]] = field(default_factory=list)
    made: list[Memory] = field(default_factory=list)


class DoubleGraph:
    """`torch.cuda.CUDAGraph`.

    Nothing runs while it records. What it allocates lies in its pool: memory that is free again while it records may be
    handed out again there, so a replay poisons it at that place. A replay also poisons what all other graphs of the
    pool left there.
    """

    def __init__(self, cuda: CudaDouble) -> None:
        self.pool = 0
        self.stream: DoubleStream = cuda.current_stream()
        self.tape: list[Work] = []
        self.made: list[Memory] = []
        self._cuda = cuda
        self._ended = False

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        cuda, self.pool = self._cuda, pool
        cuda.calls.append("begin")
        self.stream = cuda.current_stream()
        if self.stream is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        cuda.pools.open(pool)
        self.stream.recording, self.stream.invalid = self, False

    def capture_end(self) -> None:
        cuda, stream = self._cuda, self.stream
        cuda.calls.append("end")
        if cuda.current_stream() is not stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if stream.recording is not self:
            raise RuntimeError("operation not permitted: no capture is under way")
        stream.recording = None
        if stream.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")  # and the pool stays open
        cuda.pools.close(self.pool)
        self._ended = True
        cuda.graphs.add(self)

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor in the pool."""
        tensor = self._cuda.memories.allocate(like, self.stream, self)
        if tensor.numel():
            self.made.append(self._cuda.memories.of(tensor))
            self._cuda.pools.bytes[self.pool] += tensor.nbytes
        return tensor

    def free(self, memory: Memory) -> None:
        """The last tensor of some memory in the pool is gone."""
        if self.stream.recording is self:
            self.tape.append(Work(memory.poison, "a later allocation", [(memory, True)]))

    def replay(self) -> None:
        assert self._ended, "Called CUDAGraph::replay without a preceding successful capture."
        cuda = self._cuda
        cuda.calls.append("replay")
        in_pool = [memory for graph in cuda.graphs if graph.pool == self.pool for memory in graph.made]
        with cuda.queue.lock:
            cuda.launch(Work(lambda: [memory.poison() for memory in in_pool], "a graph", [(m, True) for m in in_pool]))
            for work in self.tape:
                cuda.launch(work)

    def __del__(self) -> None:
        if self._ended:
            self._cuda.pools.release(self.pool)


Graphs = weakref.WeakSet[DoubleGraph]
