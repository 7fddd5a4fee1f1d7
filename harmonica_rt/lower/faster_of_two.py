"""Chooses between two programs of one step graph: the first call measures both, and the faster one stays.

Plain launches are measured, even where the program later becomes a CUDA graph. Running a program again within a step is
safe: it writes the same slots with the same values up to rounding, and reads no slot that it writes.
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
        chosen: the faster one; None before the first call.
        seconds: the best time of each; None before the first call.
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
        if self.chosen is None:
            self.chosen = self._measured(arguments)
        return self.chosen(*arguments)

    def _measured(self, arguments: tuple[Any, ...]) -> Program:
        for program in (self.first, self.second):
            program(*arguments)  # warm up
        rounds = [[self._time(program, arguments) for program in (self.first, self.second)] for _ in range(ROUNDS)]
        a, b = (min(seconds) for seconds in zip(*rounds, strict=True))
        self.seconds = a, b
        return self.first if a <= b else self.second

    def _time(self, program: Program, arguments: tuple[Any, ...]) -> float:
        _wait(arguments[0])
        started = self._clock()
        program(*arguments)
        _wait(arguments[0])
        return self._clock() - started


def _wait(bound: tuple[Any, ...]) -> None:
    for device in {value.device for value in bound if isinstance(value, torch.Tensor) and value.is_cuda}:
        torch.cuda.synchronize(device)
