"""What a training shows and logs: nothing, a bar in the terminal, TensorBoard, or several of them.

Iterations count from 1. Every report carries its iteration, so a training resumed after `done` iterations reports those
after `done` again, and a log can drop its earlier records of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from harmonica_training.errors import TrainingError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PLAIN_LINES = 20
"""Number of lines that a training prints where no bar can be drawn."""

CELL = 8
"""Side length, in pixels, of one (step, site) in an image."""


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


class ConsoleProgress(Silent):
    """A bar with the remaining time and the figures; without a terminal, about `PLAIN_LINES` lines in total.

    Args:
        console: where to show it; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._total = self._done = 0
        self._every = 1  # iterations per plain line
        self._begun = 0.0

    def begin(self, total: int, done: int) -> None:
        """Say where a training continues, and draw the bar if there is a terminal to draw in."""
        self.end()
        if done:
            text = f"goes on after iteration {done} of {total}"
            if done >= total:
                text = f"{done} iterations are done already, and {total} are asked for: nothing is left to learn"
            self._console.print(text, highlight=False)
        self._total, self._done, self._begun = total, done, time.monotonic()
        self._every = max(1, math.ceil((total - done) / PLAIN_LINES))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))  # in a narrow terminal, the bar shrinks
            figures = TextColumn("{task.description}")
            self._bar = RichProgress(count, BarColumn(bar_width=None), figures, console=self._console)
            self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def iteration(self, record: IterationRecord) -> None:
        """Advance the bar, or print a line if one is due."""
        if self._bar is not None:
            (task,) = self._bar.task_ids
            self._bar.update(task, completed=record.iteration, description=self._figures(record))
        elif (record.iteration - self._done) % self._every == 0 or record.iteration == self._total:
            line = f"iteration {record.iteration}/{self._total}  {self._figures(record)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Stop the bar, leaving it as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, record: IterationRecord) -> str:
        # From the wall clock, not `seconds`: renewing lambda takes time as well.
        each = (time.monotonic() - self._begun) / max(1, record.iteration - self._done)
        left = _duration(each * (self._total - record.iteration))
        return (
            f"{left} left  loss {record.loss:.4g}  CUR {record.cur:.1%}  speed-up {record.speedup:.2f}x  "
            f"beta {record.beta:.3g}"
        )


class TensorBoardLog:
    """Scalars, lambda and the schedule as event files.

    A resumed training continues in the same directory: TensorBoard drops what was logged there after the iteration at
    which it resumes. Every method flushes before it returns, so a killed training has logged what it reported.

    Args:
        directory: a directory for the event files of this training only.

    Raises:
        TrainingError: TensorBoard is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                f"logging for TensorBoard needs the package tensorboard ({error}): pip install 'harmonica-rt[train]'"
            ) from error
        self._open = SummaryWriter
        self._directory = os.fspath(directory)
        self._writer: SummaryWriter | None = None

    def begin(self, total: int, done: int) -> None:
        """Open an event file that voids earlier records of iterations after `done`."""
        self.end()
        with self._failures_named():
            self._writer = self._open(self._directory, purge_step=done + 1)

    def iteration(self, record: IterationRecord) -> None:
        """Log the figures of an iteration."""
        scalars = {
            "loss/total": record.loss,
            "loss/mse": record.mse,
            "loss/penalty": record.penalty,
            "beta": record.beta,
            "cur": record.cur,
            "speedup": record.speedup,
            "seconds": record.seconds,
        }
        self._scalars(scalars, record.iteration)

    def renewed(self, iteration: int, weights: Sequence[float]) -> None:
        """Log lambda, one curve per step."""
        digits = max(2, len(str(len(weights) - 1)))
        self._scalars({f"lambda/step_{step:0{digits}}": weight for step, weight in enumerate(weights)}, iteration)

    def schedule(self, iteration: int, scores: NDArray[np.floating[Any]], compute: NDArray[np.bool_]) -> None:
        """Log two images, with one row per step and one column per site: scores in grey, computed sites in white."""
        writer = self._opened()
        with self._failures_named():
            for tag, values in (("scores", scores), ("schedule", compute)):
                writer.add_image(tag, _picture(np.asarray(values, np.float64)), iteration, dataformats="HW")
            writer.flush()

    def end(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._failures_named():
                writer.close()

    def _scalars(self, scalars: dict[str, float], iteration: int) -> None:
        writer = self._opened()
        with self._failures_named():
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
            writer.flush()

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Name the directory in an OSError: TensorBoard writes in its own thread, and a full disk has no path there."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, self._directory) from error

    def _opened(self) -> SummaryWriter:
        if self._writer is None:
            raise TrainingError("a TensorBoardLog takes figures between begin() and end() only: call begin() first")
        return self._writer


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


def _picture(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """`values` `[H, W]` in 0 to 1 as grey levels `[H * CELL, W * CELL]`."""
    grey = np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return grey.repeat(CELL, axis=0).repeat(CELL, axis=1)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
