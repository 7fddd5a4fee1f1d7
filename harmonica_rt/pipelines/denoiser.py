"""A denoiser that takes over where it was assigned: `pipe.transformer = compile(pipe.transformer, schedule)`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from harmonica_rt.call.call import Call
from harmonica_rt.engine import Engine
from harmonica_rt.pipelines.install import install_assigned
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.sampling.origin import Origin, calling_objects, pipeline_holding
from harmonica_rt.schedule import Schedule


class PipelineDenoiser(Denoiser):
    """A `Denoiser` that looks who calls it: at the first call of a pipeline that holds it, it takes over there.

    What holds it and calls `reset` by itself counts its own steps, and is left alone.
    """

    def __init__(self, given: nn.Module, schedule: Schedule, engine: Engine) -> None:
        self._counted_by: list[weakref.ref[Any]] = []  # pipelines that begin their runs by themselves
        super().__init__(given, schedule, engine)

    def reset(self, timesteps: Sequence[float] | torch.Tensor | None = None) -> None:
        """See `Session.reset`."""
        caller = pipeline_holding(self, calling_objects())
        if caller is not None and not self._begins_its_runs(caller):
            self._counted_by = [*(one for one in self._counted_by if one() is not None), weakref.ref(caller)]
        super().reset(timesteps)

    def _begins_its_runs(self, pipeline: Any) -> bool:
        return any(one() is pipeline for one in self._counted_by)

    def _call(self, call: Call, uncached: Callable[[], Any]) -> Any:
        if self._run is None or self._run.untouched or not self._following:
            self._settle_in(list(calling_objects()))
        return super()._call(call, uncached)

    def _settle_in(self, callers: list[Any]) -> None:
        """Take over in a pipeline that this was assigned to; its run began, unseen, before this call."""
        pipeline = pipeline_holding(self, callers)
        if pipeline is not None and not self._begins_its_runs(pipeline):
            install_assigned(pipeline)
            self._begin_driven(pipeline.scheduler, Origin(pipeline.scheduler, seen=False))
