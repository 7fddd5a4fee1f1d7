"""Why a model could not be captured: a kind that code can act on, and a sentence that a person can."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from harmonica_rt.errors import HarmonicaError


class Obstacle(enum.Enum):
    """What stands in the way of a captured graph."""

    EXPORT = "the model cannot be traced into one graph"
    MUTATION = "the model changes its inputs or its buffers while it runs"
    STATE = "the model changes its own attributes whenever it runs, so that one graph cannot stand for all its calls"
    HOOKS = "modules inside the model carry hooks, which a graph would bypass"
    TRAINING = "the model is in training mode"
    SITE = "a site has no output that a graph could cut at"
    OUTPUT = "the model returns something other than tensors"


@dataclass(frozen=True)
class CaptureFailure:
    """One obstacle, with the place that caused it.

    `node` names the graph node or module; `stack` is the source line in the model, where either is known.
    """

    obstacle: Obstacle
    detail: str
    node: str | None = None
    stack: str | None = None

    def __str__(self) -> str:
        text = f"{self.obstacle.value}: {self.detail}"
        if self.node is not None:
            text += f" (at {self.node})"
        if self.stack:
            text += f"\n{self.stack.strip()}"
        return text


class CaptureError(HarmonicaError, RuntimeError):
    """The model cannot be captured; `failure` says why."""

    def __init__(self, failure: CaptureFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure
