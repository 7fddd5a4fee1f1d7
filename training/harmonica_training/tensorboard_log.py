"""Writes the progress of a training as event files of TensorBoard."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harmonica_training.errors import TrainingError
from harmonica_training.progress import IterationRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PATIENCE = 10  # seconds to wait for the event file to be closed
CELL = 8  # side length, in pixels, of one (step, site) in an image


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
        """Close the event file; after `PATIENCE` seconds it is left open.

        Hazard: an interruption may leave the lock of TensorBoard's queue held, and closing then waits for it forever.
        Everything reported was flushed before, so nothing is lost.
        """
        if self._writer is not None:
            writer, self._writer = self._writer, None
            failures: list[OSError] = []
            closing = threading.Thread(target=self._close, args=(writer, failures), daemon=True)
            closing.start()
            closing.join(PATIENCE)
            if closing.is_alive():
                log.warning("TensorBoard did not close its file in %s within %d seconds", self._directory, PATIENCE)
            for failure in failures:
                raise failure

    def _close(self, writer: SummaryWriter, failures: list[OSError]) -> None:
        try:
            with self._failures_named():
                writer.close()
        except OSError as error:
            failures.append(error)

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


def _picture(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """`values` `[H, W]` in 0 to 1 as grey levels `[H * CELL, W * CELL]`."""
    grey = np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    return grey.repeat(CELL, axis=0).repeat(CELL, axis=1)
