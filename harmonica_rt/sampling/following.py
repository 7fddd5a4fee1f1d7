"""The pipelines that a denoiser is in, and the schedulers that drive it through them.

Several pipelines may share one denoiser, with one scheduler (`from_pipe` makes such) or with one each. The schedulers
of those that were compiled are watched. A pipeline that was not, with a scheduler of its own, calls the denoiser all
the same; its calls belong to no run, least of all to one of another pipeline that was broken off. Nothing in a call
says who made it, so the stack is asked.
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
    """What one listener follows."""

    def __init__(self, listener: Listener) -> None:
        self._listener = weakref.ref(listener)
        self._followed: list[_Followed] = []

    def __bool__(self) -> bool:
        return bool(self._followed)

    @property
    def pipelines(self) -> list[Any]:
        """Those that are still alive."""
        return [pipeline for one in self._followed if (pipeline := one.pipeline()) is not None]

    def follows(self, scheduler: Any) -> bool:
        """Whether this is the scheduler of a pipeline that is followed."""
        return any(one.scheduler is scheduler for one in self._followed)

    def add(self, pipeline: Any) -> None:
        """Follow the scheduler of a pipeline from now on.

        Raises:
            HarmonicaError: it drives another compiled model.
        """
        if not any(one.pipeline() is pipeline for one in self._followed):
            self._watch(pipeline.scheduler)
            self._followed.append(_Followed(weakref.ref(pipeline), pipeline.scheduler))

    def leave(self, pipeline: Any) -> None:
        """Stop following it."""
        left = [one for one in self._followed if one.pipeline() is pipeline]
        kept = [one for one in self._followed if one not in left]
        for one in left:
            self._release(one.scheduler, kept)
        self._followed = kept  # last: what interrupts this leaves nothing watched that nobody knows of

    def release(self) -> None:
        """Leave all schedulers alone again."""
        for one in self._followed:
            self._release(one.scheduler, [])
        self._followed = []

    def replaced(self) -> list[Any]:
        """Follow schedulers that took the place of another one since the last look (`from_config` makes a new object).

        Returns them: their runs have begun unseen.
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
    """The error for a scheduler that has a listener already."""
    return HarmonicaError(
        "this scheduler already drives another compiled model. Give each pipeline a scheduler of its own; if it is "
        f"this pipeline that was compiled before, undo that first: {listener.undone_by}"
    )
