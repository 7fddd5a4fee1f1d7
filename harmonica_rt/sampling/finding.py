"""A session that finds out which pipeline calls it, if it was not attached to one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.sampling.frames import calling_objects, calling_pipeline
from harmonica_rt.sampling.origin import Origin
from harmonica_rt.sampling.session import Session


class FindsItsPipeline(Session):
    """A session that follows a pipeline from its first call on, if the pipeline holds what the session runs.

    A pipeline that calls `reset` itself counts its own steps, and is left alone.
    """

    def __init__(self, *given: Any) -> None:
        self._counted_by: list[weakref.ref[Any]] = []  # pipelines that begin their own runs
        super().__init__(*given)

    def reset(self, timesteps: Sequence[float] | torch.Tensor | None = None, *, steps: int | None = None) -> None:
        """See `Session.reset`."""
        caller = calling_pipeline(self._is_me, calling_objects())
        if caller is not None and not self._begins_its_runs(caller):
            self._counted_by = [*(one for one in self._counted_by if one() is not None), weakref.ref(caller)]
        super().reset(timesteps, steps=steps)

    def _is_me(self, value: object) -> bool:
        """Whether `value`, held by a pipeline, is what this session runs."""
        return value is self

    def _follow(self, pipeline: Any) -> None:
        """Follow a pipeline that has been found."""
        raise NotImplementedError  # depends on how the model was compiled

    def _begins_its_runs(self, pipeline: Any) -> bool:
        return any(one() is pipeline for one in self._counted_by)

    def _call(self, call: Call, uncached: Callable[[], Any]) -> Any:
        run = self._current.run
        if run is None or run.untouched or not self._following:
            self._look_who_calls(list(calling_objects()))
        return super()._call(call, uncached)

    def _look_who_calls(self, callers: list[Any]) -> None:
        """Follow the pipeline among `callers`; its run began unobserved, before this call."""
        pipeline = calling_pipeline(self._is_me, callers)
        can_be_watched = callable(getattr(getattr(pipeline, "scheduler", None), "step", None))
        if pipeline is not None and can_be_watched and not self._begins_its_runs(pipeline):
            self._follow(pipeline)
            self._begin_driven(pipeline.scheduler, Origin(pipeline.scheduler, seen=False))
