"""What is done with a compiled pipeline: its compiled model is returned, or the pipeline is restored."""

from __future__ import annotations

from typing import Any, TypeVar

from harmonica_rt.api.compiled_model import CompiledModel
from harmonica_rt.api.subject import runs_through_torch_compile
from harmonica_rt.arguments import check_pipeline
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.pipelines.install import denoiser_module, held_denoiser, install_assigned, installed, uninstall

P = TypeVar("P")


def uncompile(pipeline: P) -> P:
    """Restore a pipeline's plain denoiser and scheduler, and return the same pipeline.

    A pipeline that is not compiled is returned unchanged.

    Raises:
        ArgumentError: the argument is not a pipeline.
    """
    check_pipeline(pipeline)
    install_assigned(pipeline)
    uninstall(pipeline)
    return pipeline


def get_compiled(pipeline: Any) -> CompiledModel:
    """Return the compiled denoiser of a pipeline, for example for its `report()`.

    Raises:
        ArgumentError: the argument is not a pipeline.
        HarmonicaError: the pipeline is not compiled.
    """
    check_pipeline(pipeline)
    install_assigned(pipeline)
    compiled, name = installed(denoiser_module(pipeline)), type(pipeline).__name__
    if isinstance(compiled, CompiledModel):
        return compiled
    if compiled is not None:
        raise HarmonicaError(f"this {name} is not compiled but runs the reference; compile(pipe, schedule) compiles it")
    if runs_through_torch_compile(held_denoiser(pipeline)):
        raise HarmonicaError(
            f"this {name} is not compiled by harmonica_rt.compile but by torch.compile; "
            "attach(pipe.transformer).report() reports on it"
        )
    raise HarmonicaError(f"this {name} is not compiled; harmonica_rt.compile(pipe, schedule) compiles it")
