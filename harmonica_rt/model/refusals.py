"""States of a model that no static graph can represent: training, and hooks inside it."""

from __future__ import annotations

from torch import nn

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.model.hooks import accelerate_hook, diffusers_hooks, forward_hooks, forward_hooks_of_every_module


def check_capturable(model: nn.Module) -> None:
    """Raise CaptureError if the model is in a state that no static graph can represent."""
    if model.training:
        raise CaptureError(CaptureFailure(Obstacle.TRAINING, "call model.eval() first", node=type(model).__name__))
    if any(forward_hooks_of_every_module()):
        raise CaptureError(CaptureFailure(Obstacle.HOOKS, "forward hooks registered for every module"))
    for name, module in model.named_modules():
        if name and (hooks := _hooks_of(module)):
            raise CaptureError(CaptureFailure(Obstacle.HOOKS, f"{hooks} on {type(module).__name__}", node=name))


def _hooks_of(module: nn.Module) -> str | None:
    if any(forward_hooks(module)):
        return "forward hooks"
    if (hook := accelerate_hook(module)) is not None:
        return f"an accelerate hook ({type(hook).__name__})"
    if hooks := diffusers_hooks(module):
        return f"diffusers hooks ({', '.join(hooks)})"
    return None
