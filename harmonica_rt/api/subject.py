"""Finds the model in what a public function was given: a model, perhaps in wrappers, or a pipeline.

Hazard: a model may be compiled twice, by a wrapper of torch.compile inside or outside one of ours. Each then skips its
own share of the work under its own schedule. Such models are refused here, with the remedy.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from harmonica_rt.arguments import check_subject
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.pipelines.install import held_denoiser, install_assigned
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.wrappers import unwrapped


def held_model(model_or_pipeline: Any) -> nn.Module:
    """The model as it was given, with its wrappers; for a pipeline, its denoiser.

    Raises:
        ArgumentError: neither a model nor a pipeline was given.
        HarmonicaError: the pipeline has no known denoiser.
    """
    check_subject(model_or_pipeline)
    if isinstance(model_or_pipeline, Denoiser):
        return model_or_pipeline.given
    if isinstance(model_or_pipeline, nn.Module):
        return model_or_pipeline
    return held_denoiser(model_or_pipeline)


def model_to_compile(model_or_pipeline: Any) -> nn.Module:
    """The plain model, without its wrappers.

    Raises:
        ArgumentError: neither a model nor a pipeline was given.
        HarmonicaError: the pipeline has no known denoiser, torch.compile wraps a `CompiledModel`, or it compiled the
            model with the backend of this package.
    """
    check_subject(model_or_pipeline)
    if not isinstance(model_or_pipeline, nn.Module):
        install_assigned(model_or_pipeline)
    held = held_model(model_or_pipeline)
    model: nn.Module = unwrapped(held)
    if isinstance(model, Denoiser):
        raise HarmonicaError(
            f"torch.compile wraps a compiled {type(model.model).__name__} here; compile the model itself: "
            "wrapper._orig_mod.model"
        )
    if held is not model and runs_through_torch_compile(held):
        raise HarmonicaError(
            f"this {type(model).__name__} is compiled already, by torch.compile with this package's backend. Undo "
            "that first: harmonica_rt.attach(pipe.transformer).detach(), then "
            "pipe.transformer = pipe.transformer._orig_mod"
        )
    return model


def runs_through_torch_compile(module: nn.Module) -> bool:
    """Whether torch.compile compiled this module with the backend of this package."""
    if not hasattr(module, "_orig_mod") and not isinstance(module.__dict__.get("_compiled_call_impl"), FunctionType):
        return False
    from harmonica_rt.backend import is_backend_of  # dynamo is already in use when this line is reached

    return is_backend_of(module)
