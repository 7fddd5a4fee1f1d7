"""A denoiser that installs itself where it is assigned: `pipe.transformer = compile(pipe.transformer, schedule)`."""

from __future__ import annotations

from typing import Any

from harmonica_rt.pipelines.install import install_assigned
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.sampling.finding import FindsItsPipeline


class PipelineDenoiser(FindsItsPipeline, Denoiser):
    """A `Denoiser` that checks its caller: at the first call by a pipeline that holds it, it is installed there."""

    def _follow(self, pipeline: Any) -> None:
        install_assigned(pipeline)
