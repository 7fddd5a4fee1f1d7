"""What training raises on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harmonica_rt.errors import HarmonicaError

if TYPE_CHECKING:
    from harmonica_training.checkpoint import Checkpoint


class TrainingError(HarmonicaError):
    """Training cannot start or go on: a pipeline, a configuration or a file does not fit."""


class DivergenceError(TrainingError):
    """A loss or a logit is no longer a finite number."""


class TrainingInterrupted(KeyboardInterrupt):
    """A training was interrupted (Ctrl-C); what it had learned until then is kept.

    Attributes:
        iteration: iterations done, those of earlier processes among them.
        checkpoint: the state after the last finished iteration, for `save_checkpoint`; None if this process finished
            none.
        path: the file that the checkpoint was written to; None without a directory, and in all processes but the first.
    """

    def __init__(self, iteration: int, checkpoint: Checkpoint | None, path: Path | None) -> None:
        kept = "its state is in `.checkpoint`" if path is None else f"call train again with directory={path.parent}"
        super().__init__(f"interrupted after iteration {iteration}" + (f"; {kept} to go on" if checkpoint else ""))
        self.iteration = iteration
        self.checkpoint = checkpoint
        self.path = path


class CheckpointError(TrainingError):
    """A checkpoint is missing, broken, or of another format version."""
