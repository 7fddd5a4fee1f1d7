"""The errors that training raises deliberately."""

from __future__ import annotations

from harmonica_rt.errors import HarmonicaError


class TrainingError(HarmonicaError):
    """Training cannot start or continue: a pipeline, a configuration or a file does not fit."""


class DivergenceError(TrainingError):
    """A loss or a logit is no longer a finite number."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, broken, or has another format version."""
