"""States of a model that no static graph can represent: training, and hooks inside it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle


def check_capturable(model: nn.Module) -> None:
    """Raise CaptureError if the model is in a state that no static graph can represent."""
    if model.training:
        raise CaptureError(CaptureFailure(Obstacle.TRAINING, "call model.eval() first", node=type(model).__name__))
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        raise CaptureError(CaptureFailure(Obstacle.HOOKS, "forward hooks registered for every module"))
    for name, module in model.named_modules():
        if name and (hooks := _hooks_of(module)):
            raise CaptureError(CaptureFailure(Obstacle.HOOKS, f"{hooks} on {type(module).__name__}", node=name))


def _hooks_of(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    attributes = module.__dict__
    if attributes.get("_hf_hook") is not None:
        return f"an accelerate hook ({type(attributes['_hf_hook']).__name__})"
    registry = attributes.get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"diffusers hooks ({', '.join(registry.hooks)})"
    return None
