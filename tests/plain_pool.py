"""A pool whose graphs are bodies that are called again: for what gets recorded when, and what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmonica_rt.execute.cuda_graphs import Body, Graph, Graphs

CPU = torch.device("cpu")


class Recorded:
    """A graph that calls its body."""

    def __init__(self, body: Body) -> None:
        self.replay = body


class PlainPool:
    """Records by keeping the body.

    Args:
        seconds: of each measurement, in turn.
        refused: numbers of the recordings that fail, from 1.
        device: where its graphs run.
    """

    def __init__(self, seconds: Sequence[float] = (), refused: Sequence[int] = (), device: torch.device = CPU) -> None:
        self.nbytes = 0
        self.device = device
        self.recorded = 0
        self._seconds = list(seconds)
        self._refused = refused

    @property
    def graphs(self) -> Graphs:
        """Graphs that it records on every device, and that are all kept."""
        return Graphs(lambda _: self, measured=False)

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """Run it."""
        return body()

    def record(self, body: Body) -> Graph:
        """Counted; nothing runs."""
        self.recorded += 1
        if self.recorded in self._refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Recorded(body)

    def seconds(self, run: Callable[[], object]) -> float:
        """Run it, and return the next of the given seconds."""
        run()
        return self._seconds.pop(0)
