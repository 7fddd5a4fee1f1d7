"""What training raises on purpose."""

from __future__ import annotations

from harmonica_rt.errors import HarmonicaError


class TrainingError(HarmonicaError):
    """Training cannot start or go on: a pipeline, a configuration or a file does not fit."""


class DivergenceError(TrainingError):
    """A loss or a logit is no longer a finite number."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, broken, or of another format version."""
