"""The memory of a plan's streams: lent to a stream for one run, and taken back when the next run begins.

This pool holds arenas. The *pool* of the glossary, the memory of a plan's CUDA graphs, is in `cuda_graphs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harmonica_rt.execute.graph_memory import GraphMemory
from harmonica_rt.execute.graph_replay import GraphedPrograms
from harmonica_rt.execute.slot_buffers import SlotBuffers


@dataclass(frozen=True, eq=False)
class StreamMemory:
    """What belongs to one stream and outlives it: its slots, and its graphs with what they read and write."""

    buffers: SlotBuffers
    graphed: GraphMemory | None


class ArenaPool:
    """The memory of all streams of a plan: as many arenas as it ever had streams at once.

    Args:
        make: makes the memory of one more stream.
    """

    def __init__(self, make: Callable[[], StreamMemory]) -> None:
        self._make = make
        self._free: list[StreamMemory] = []
        self._lent: list[StreamMemory] = []

    def begin_run(self) -> None:
        """Take back all arenas, to be lent in the same order again."""
        self._free, self._lent = [*self._free, *reversed(self._lent)], []

    def lend(self) -> StreamMemory:
        """Memory for one stream; free memory is lent in the order of the last run."""
        memory = self._free.pop() if self._free else self._make()
        self._lent.append(memory)
        return memory

    def begin_run_of_graphs(self, moved: bool) -> None:
        """The run first uses its parameters; where they have moved, graphs that hold their addresses are dropped."""
        for graphs in self.graphs:
            graphs.begin_run(moved=moved)

    @property
    def lent(self) -> int:
        """The number of streams of the current run."""
        return len(self._lent)

    @property
    def graphs(self) -> tuple[GraphedPrograms, ...]:
        """The graphs of all arenas."""
        return tuple(memory.graphed.graphs for memory in self._held if memory.graphed is not None)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(memory.buffers.nbytes for memory in self._held)

    @property
    def static_bytes(self) -> int:
        """Bytes of the tensors at fixed addresses that graphs use besides slots."""
        return sum(memory.graphed.nbytes for memory in self._held if memory.graphed is not None)

    @property
    def _held(self) -> tuple[StreamMemory, ...]:
        return (*self._free, *self._lent)
