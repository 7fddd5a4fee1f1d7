"""A stand-in for CUDA graphs on a CPU: what a graph would get wrong comes out wrong here too.

A recorded body keeps the very tensors it was recorded with, so that whatever was replaced since is not seen. The pool
is shared: the outputs of a graph turn to NaN as soon as another one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harmonica_rt.execute.cuda_graphs import Body, Graph, Graphs


class StandInPool:
    """Counts what is asked of it.

    Args:
        clock: seconds of each measurement, in turn; None measures nothing.
        refuse: raise in every recording, as CUDA does.
    """

    def __init__(self, clock: list[float] | None = None, *, refuse: bool = False) -> None:
        self.nbytes = 0
        self.device = torch.device("cpu")
        self.warmed = self.recorded = self.replayed = 0
        self._clock = clock or []
        self._refuse = refuse
        self._in_pool: list[torch.Tensor] = []

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """Run it."""
        self.warmed += 1
        return body()

    def record(self, body: Body) -> Graph:
        """Keep the body; nothing runs while a graph is recorded."""
        if self._refuse:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.recorded += 1
        return _Recorded(self, body)

    def seconds(self, run: Callable[[], object]) -> float:
        """Run it, and return the next of the given seconds."""
        run()
        return self._clock.pop(0)

    def run(self, body: Body) -> tuple[Any, ...]:
        """Replay a body; what an earlier graph left in the pool is overwritten first."""
        self.replayed += 1
        for tensor in self._in_pool:
            tensor.fill_(torch.nan)
        outputs = tuple(o.clone() if isinstance(o, torch.Tensor) else o for o in body())
        self._in_pool = [o for o in outputs if isinstance(o, torch.Tensor)]
        return outputs


class _Recorded:
    def __init__(self, pool: StandInPool, body: Body) -> None:
        self._pool = pool
        self._body = body

    def replay(self) -> tuple[Any, ...]:
        """See `Graph.replay`."""
        return self._pool.run(self._body)


def graphs_in(pool: StandInPool, *, measured: bool = False) -> Graphs:
    """Graphs recorded by `pool` on every device."""
    return Graphs(lambda _: pool, measured=measured)
