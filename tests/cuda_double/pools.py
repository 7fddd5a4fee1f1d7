"""Memory of the double that outlives a recording: the pools of graphs, and the workspaces of cuBLAS."""

from __future__ import annotations

import threading
from collections import Counter

from tests.cuda_double.streams import DoubleStream


class Pools:
    """Memory pools of graphs, by handle."""

    def __init__(self) -> None:
        self._handles = 0
        self._users: Counter[int] = Counter()  # graphs of each pool
        self._freed: set[int] = set()
        self.opened: set[int] = set()  # recorded into at the moment
        self.bytes: Counter[int] = Counter()
        self.cached = 0  # bytes outside all pools

    def new_handle(self) -> int:
        self._handles += 1
        return self._handles

    def open(self, pool: int) -> None:
        """A recording begins."""
        if pool in self._freed:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self._users[pool] += 1
        if pool in self.opened:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.opened.add(pool)

    def close(self, pool: int) -> None:
        """A recording ends."""
        if pool not in self.opened:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.opened.remove(pool)

    def release(self, pool: int) -> None:
        """A graph of the pool is destroyed."""
        self._users[pool] -= 1
        if not self._users[pool]:
            self._freed.add(pool)

    def reserved(self) -> int:
        """Bytes that the process holds."""
        return self.cached + sum(self.bytes.values())

    def give_back(self) -> None:
        """Free what no graph needs any more."""
        self.cached = 0
        for pool in self._freed:
            del self.bytes[pool]


class Workspaces:
    """Handles of cuBLAS, one per thread, and their workspaces, one per thread and stream."""

    def __init__(self, faults: list[str]) -> None:
        self._faults = faults
        self._handles: set[threading.Thread] = set()
        self._pools: dict[tuple[threading.Thread, DoubleStream], int] = {}  # where each lies; 0 outside all pools

    def use(self, stream: DoubleStream) -> None:
        """Note a matrix product of this thread on a stream, and a fault if its workspace lies in another pool."""
        thread, recording = threading.current_thread(), stream.recording
        if thread not in self._handles:
            if recording is not None:
                stream.refuse("cublasCreate: operation not permitted when stream is capturing")
            self._handles.add(thread)
        pool = recording.pool if recording is not None else 0
        owner = self._pools.setdefault((thread, stream), pool)
        if owner != pool:
            self._faults.append(f"pool {pool} (0: none) uses a workspace of pool {owner}")

    def clear(self) -> None:
        self._pools.clear()
