"""A denoiser that installs itself where it is assigned: `pipe.transformer = compile(pipe.transformer, schedule)`.

The pipeline then holds the denoiser itself, and nothing follows its scheduler yet. The first call reveals the pipeline.
"""

from __future__ import annotations

from typing import Any

from harmonica_rt.pipelines.install import install_assigned
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.sampling.finding import FindsItsPipeline


class PipelineDenoiser(FindsItsPipeline, Denoiser):
    """A `Denoiser` that installs itself in a pipeline that holds it, at the first call that comes from there."""

    def _follow(self, pipeline: Any) -> None:
        install_assigned(pipeline)
