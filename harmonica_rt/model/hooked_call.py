"""Runs the hooks of a denoiser around a call that replaces its forward.

Installing a call in a module (as `nn.Module.compile` does) bypasses the hooks that others attached to it: forward
hooks, and accelerate's, which move parameters to the device. The module's own code runs them here, around the
replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from harmonica_rt.changes import Changes
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.model.forward import Swapped, forward_attribute, own_forward
from harmonica_rt.model.hooks import DIFFUSERS_HOOKS, forward_hooks, forward_hooks_of_every_module


def call_with_hooks(
    model: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call `inner` instead of the forward of `model`, with the hooks of `model` around it.

    Raises:
        HarmonicaError: the model carries diffusers hooks (another feature cache, say), which replace the forward.
    """
    registry = getattr(model, DIFFUSERS_HOOKS, None)  # a wrapper hands out the registry of the module inside
    if registry is not None and registry.hooks:
        raise HarmonicaError(
            f"{type(model).__name__} carries the diffusers hooks {', '.join(registry.hooks)}, which replace its "
            "forward. Disable them (disable_cache(), for a cache; for group offloading, let the pipeline move the "
            "whole model with enable_model_cpu_offload() instead) or uncompile the model"
        )
    name = forward_attribute(model)
    if name == "forward" and not _has_hooks(model):
        return inner(*args, **kwargs)
    changes = Changes()
    with changes, changes:
        swapped = Swapped(inner, own_forward(model))
        changes.undone_by(swapped.retire)
        changes.set(model.__dict__, name, swapped)
        return model._call_impl(*args, **kwargs)


def _has_hooks(model: nn.Module) -> bool:
    return any(forward_hooks(model)) or any(forward_hooks_of_every_module())
