"""The pipelines that a denoiser is in, and the schedulers that drive it through them.

Several pipelines may share one denoiser, with one scheduler (as `from_pipe` does) or with one each. The schedulers of
compiled pipelines are watched. A pipeline that was not compiled, with its own scheduler, still calls the denoiser; its
calls belong to no run, least of all to an abandoned run of another pipeline. Nothing in a call says who made it, so the
stack is inspected.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.sampling.scheduler import Listener, listener_of, unwatch, watch


@dataclass
class _Followed:
    pipeline: weakref.ref[Any]
    scheduler: Any


class Following:
    """The pipelines and schedulers that one listener follows."""

    def __init__(self, listener: Listener) -> None:
        self._listener = weakref.ref(listener)
        self._followed: list[_Followed] = []

    def __bool__(self) -> bool:
        return bool(self._followed)

    @property
    def pipelines(self) -> list[Any]:
        """The followed pipelines that are still alive."""
        return [pipeline for one in self._followed if (pipeline := one.pipeline()) is not None]

    def follows(self, scheduler: Any) -> bool:
        """Whether this is the scheduler of a followed pipeline."""
        return any(one.scheduler is scheduler for one in self._followed)

    def add(self, pipeline: Any) -> None:
        """Follow the scheduler of a pipeline from now on.

        Raises:
            HarmonicaError: the scheduler drives another compiled model.
        """
        if not any(one.pipeline() is pipeline for one in self._followed):
            self._watch(pipeline.scheduler)
            self._followed.append(_Followed(weakref.ref(pipeline), pipeline.scheduler))

    def leave(self, pipeline: Any) -> None:
        """Stop following the pipeline."""
        left = [one for one in self._followed if one.pipeline() is pipeline]
        kept = [one for one in self._followed if one not in left]
        for one in left:
            self._release(one.scheduler, kept)
        self._followed = kept  # last, so that an interruption leaves no scheduler watched but forgotten

    def release(self) -> None:
        """Stop watching all schedulers."""
        for one in self._followed:
            self._release(one.scheduler, [])
        self._followed = []

    def follow_replacements(self) -> list[Any]:
        """Follow schedulers that replaced another since the last check (`from_config` makes a new object).

        Returns the new schedulers; their runs began unobserved.
        """
        found = []
        for one in self._followed:
            pipeline = one.pipeline()
            if pipeline is None or pipeline.scheduler is one.scheduler:
                continue
            self._watch(pipeline.scheduler)
            before, one.scheduler = one.scheduler, pipeline.scheduler
            found.append(one.scheduler)
            self._release(before, self._followed)
        return found

    def _watch(self, scheduler: Any) -> None:
        listener, current = self._listener(), listener_of(scheduler)
        if listener is None or current is listener:
            return
        if current is not None:
            raise scheduler_in_use(current)
        watch(scheduler, listener)

    def _release(self, scheduler: Any, kept: list[_Followed]) -> None:
        if all(one.scheduler is not scheduler for one in kept):
            listener = listener_of(scheduler)
            if listener is not None and listener is self._listener():
                unwatch(scheduler)


def scheduler_in_use(listener: Listener) -> HarmonicaError:
    """The error for a scheduler that already has a listener."""
    return HarmonicaError(
        "this scheduler already drives another compiled model. Give each pipeline a scheduler of its own; if it is "
        f"this pipeline that was compiled before, undo that first: {listener.undone_by}"
    )
