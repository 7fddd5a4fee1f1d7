"""The reports of a training, and who receives them: nobody, or several receivers.

`console_progress` shows them in a terminal, `tensorboard_log` logs them. Iterations count from 1. Every report
carries its iteration, so a training resumed after `done` iterations reports those after `done` again, and a log can
drop its earlier records of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class IterationRecord:
    """Figures of one iteration.

    Attributes:
        iteration: counted from 1.
        loss: the minimised loss: squared errors weighted by lambda, plus the penalty.
        mse: mean squared error of the student against the teacher, unweighted.
        penalty: cost of computing, weighted by beta.
        beta: weight of the penalty.
        cur: CUR of the current schedule: the share of entries that are reused, 0 to 1.
        speedup: work of the uncached model / work with the current schedule.
        seconds: wall time of the iteration, in seconds.
    """

    iteration: int
    loss: float
    mse: float
    penalty: float
    beta: float
    cur: float
    speedup: float
    seconds: float


class Progress(Protocol):
    """Receives the progress of a training."""

    def begin(self, total: int, done: int) -> None:
        """A training of `total` iterations begins, or continues after `done` of them."""

    def iteration(self, record: IterationRecord) -> None:
        """An iteration is over."""

    def renewed(self, iteration: int, weights: Sequence[float]) -> None:
        """Lambda was renewed in `iteration`; `weights` has one number per step."""

    def schedule(self, iteration: int, scores: NDArray[np.floating[Any]], compute: NDArray[np.bool_]) -> None:
        """After `iteration`, the router has `scores` (0 to 1) and the schedule is `compute`; both `[steps, sites]`."""

    def end(self) -> None:
        """The training is over, or was interrupted."""


class Silent:
    """Shows nothing."""

    def begin(self, total: int, done: int) -> None:
        """Do nothing."""

    def iteration(self, record: IterationRecord) -> None:
        """Do nothing."""

    def renewed(self, iteration: int, weights: Sequence[float]) -> None:
        """Do nothing."""

    def schedule(self, iteration: int, scores: NDArray[np.floating[Any]], compute: NDArray[np.bool_]) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class Several:
    """Forwards everything to each of `progress`, in order."""

    def __init__(self, *progress: Progress) -> None:
        self._progress = progress

    def begin(self, total: int, done: int) -> None:
        """Begin each."""
        for each in self._progress:
            each.begin(total, done)

    def iteration(self, record: IterationRecord) -> None:
        """Tell each."""
        for each in self._progress:
            each.iteration(record)

    def renewed(self, iteration: int, weights: Sequence[float]) -> None:
        """Tell each."""
        for each in self._progress:
            each.renewed(iteration, weights)

    def schedule(self, iteration: int, scores: NDArray[np.floating[Any]], compute: NDArray[np.bool_]) -> None:
        """Tell each."""
        for each in self._progress:
            each.schedule(iteration, scores, compute)

    def end(self) -> None:
        """End each."""
        for each in self._progress:
            each.end()
