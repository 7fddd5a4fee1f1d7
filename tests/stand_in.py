"""A pool of graphs on the double of `torch.cuda` that counts what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harmonica_rt.execute.cuda_graphs import Body, CudaPool, Graph, Graphs


class StandInPool(CudaPool):
    """The pool of the product over the double, which must be in the place of `torch.cuda`.

    Args:
        clock: seconds of each measurement, in turn; None measures nothing.
        refuse: raise in every recording, as CUDA does.
    """

    def __init__(self, clock: list[float] | None = None, *, refuse: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.warmed = self.recorded = self.replayed = 0
        self._clock = clock or []
        self._refuse = refuse

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """Counted."""
        self.warmed += 1
        return super().warm_up(body)

    def record(self, body: Body) -> Graph:
        """Counted, unless it is refused."""
        if self._refuse:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        graph = super().record(body)
        self.recorded += 1
        return _Counted(self, graph)

    def seconds(self, run: Callable[[], object]) -> float:
        """Run it, and return the next of the given seconds."""
        run()
        return self._clock.pop(0)


class _Counted:
    def __init__(self, pool: StandInPool, graph: Graph) -> None:
        self._pool = pool
        self._graph = graph

    def replay(self) -> tuple[Any, ...]:
        """See `Graph.replay`."""
        self._pool.replayed += 1
        return self._graph.replay()


def graphs_in(pool: StandInPool, *, measured: bool = False) -> Graphs:
    """Graphs recorded by `pool` on every device."""
    return Graphs(lambda _: pool, measured=measured)
