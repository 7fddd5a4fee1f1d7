"""Chooses between two programs of one step graph: both are measured, and the faster one stays.

What is measured is what will run: graphs where the programs become CUDA graphs, plain launches elsewhere. Running a
program again within a step is safe: it writes the same slots with the same values up to rounding, and reads no slot
that it writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmonica_rt.lower.plain import Program

ROUNDS = 3  # of measurement, each timing both programs in turn; the best time of each program counts


class Faster(Program):
    """The faster of two programs.

    Args:
        first, second: programs of the same step graph.
        clock: returns the time in seconds.

    Attributes:
        first, second: the programs.
        chosen: the faster one; None before they are measured.
        seconds: the best time of each; None before they are measured.
    """

    def __init__(self, first: Program, second: Program, clock: Callable[[], float] = time.perf_counter) -> None:
        self.step = first.step
        self.first, self.second = first, second
        self.chosen: Program | None = None
        self.seconds: tuple[float, float] | None = None
        self._clock = clock

    def __call__(
        self,
        bound: tuple[Any, ...],
        leaves: Sequence[Any],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        hoisted: Sequence[torch.Tensor] = (),
    ) -> tuple[Any, ...]:
        """See `Program.__call__`."""
        arguments = bound, leaves, reads, writes, hoisted
        chosen = self.chosen or self.choose(*self._measured(arguments))
        return chosen(*arguments)

    def choose(self, first: float, second: float) -> Program:
        """Keep the program that took fewer seconds, and return it."""
        self.seconds = first, second
        self.chosen = self.first if first <= second else self.second
        return self.chosen

    def _measured(self, arguments: tuple[Any, ...]) -> tuple[float, float]:
        """The best time of plain launches of each, in seconds."""
        for program in (self.first, self.second):
            program(*arguments)  # warm up
        rounds = [[self._time(program, arguments) for program in (self.first, self.second)] for _ in range(ROUNDS)]
        first, second = (min(seconds) for seconds in zip(*rounds, strict=True))
        return first, second

    def _time(self, program: Program, arguments: tuple[Any, ...]) -> float:
        _wait(arguments[0])
        started = self._clock()
        program(*arguments)
        _wait(arguments[0])
        return self._clock() - started


def _wait(bound: tuple[Any, ...]) -> None:
    for device in {value.device for value in bound if isinstance(value, torch.Tensor) and value.is_cuda}:
        torch.cuda.synchronize(device)
