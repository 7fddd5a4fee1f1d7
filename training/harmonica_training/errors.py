"""The errors that training raises deliberately."""

from __future__ import annotations

from harmonica_rt.errors import HarmonicaError


class TrainingError(HarmonicaError):
    """Training cannot start or continue: a pipeline, a configuration or a file does not fit."""


class DivergenceError(TrainingError):
    """The error or its gradient is no longer finite, or the error has grown out of bounds."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, damaged, of another format version, or holds numbers that are not finite."""
