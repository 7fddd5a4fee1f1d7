"""The errors of harmonica-rt; a few more are defined beside the code that raises them.

Each error also derives from the built-in that a caller would expect (`ValueError` for a bad schedule, `RuntimeError`
for a run that went wrong), so that code which does not know this package can still handle it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from harmonica_rt.untrusted.text import printable


class HarmonicaError(Exception):
    """Base of all errors of this package. Messages quote files and names, so unprintable characters are escaped."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ArgumentError(HarmonicaError, TypeError, ValueError):
    """A public function was given an argument that it does not accept."""


class ScheduleError(HarmonicaError, ValueError):
    """A schedule, or the file that holds it, is malformed."""


class ScheduleMismatchError(ScheduleError):
    """A valid schedule does not fit: it is for another model, other sites or another number of steps."""


class ScheduleWriteError(ScheduleError, OSError):
    """A schedule cannot be written; `errno`, `strerror` and `filename` are those of the OSError that caused it.

    It is also a FileNotFoundError, PermissionError, IsADirectoryError or NotADirectoryError if the cause is one.
    """

    def __init__(self, errno: int | None, strerror: str, filename: str) -> None:
        super().__init__(errno, strerror, filename)
        self.errno, self.strerror, self.filename = errno, strerror, filename

    def __str__(self) -> str:
        return printable(f"{self.filename}: cannot be written ({self.strerror})")


class PlanFileError(HarmonicaError, ValueError):
    """A saved plan cannot be written or read, or is for another model, torch or version."""


class SiteError(HarmonicaError, ValueError):
    """A site does not exist, never runs, lies inside another site, or no site was found."""


class SignatureError(HarmonicaError, TypeError):
    """The denoiser was called with arguments that it does not take, or that no plan can be made for."""


class RunError(HarmonicaError, RuntimeError):
    """A sampling run left the path that its schedule was made for; the run's images must not be trusted."""


class ConcurrentRunError(RunError):
    """One compiled model was used by two runs at once."""


class InvariantError(HarmonicaError, AssertionError):
    """A plan or a graph breaks a rule that all of them must keep: a defect of this package, not of its caller."""


class SamplerError(HarmonicaError, ValueError):
    """`sample` cannot take the steps of a scheduler, or what the model returns, for a linear sampler."""


class RegionError(HarmonicaError, RuntimeError):
    """Inductor cannot compile a part of the model; the message says which part, and why."""


class KernelError(HarmonicaError, RuntimeError):
    """Triton cannot compile the kernel of an operator; the message names the operator and its arguments."""


class Obstacle(enum.Enum):
    """Why a model cannot be captured."""

    EXPORT = "the model cannot be traced into one graph"
    MUTATION = "the model changes its inputs or its buffers while it runs"
    STATE = "the model carries state from one call to the next, so one graph cannot stand for all its calls"
    HOOKS = "modules inside the model carry hooks, which a graph would bypass"
    TRAINING = "the model is in training mode"
    SITE = "a site has no output that a graph could cut at"
    SPAN = "a span of blocks has an output that is no residual, so there is nothing to cache"
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
