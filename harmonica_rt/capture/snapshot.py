"""Has the model changed since it was captured?

A captured graph bakes in the module tree, every plain attribute read while tracing (LoRA scales, attention processors,
flags) and the metadata of the weights, but not the values of the weights. So those may change freely; the rest makes
the graph stale, and stale graphs give wrong images silently. Attributes are looked at one level deep: what lies deeper
(a list in a dict in an object) is not seen. Checked at the first call of a run, not each step.
"""

from __future__ import annotations

from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from harmonica_rt.capture.forward import own_forward
from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle

_SCALARS = (type(None), bool, int, float, str, torch.device)

# Parameters, buffers and children are compared by themselves; hooks and accelerate's wrapper by what they are.
_OF_EVERY_MODULE = frozenset((*nn.Module().__dict__, "_compiled_call_impl", "_hf_hook", "_diffusers_hook")) - {
    "training"
}


class ModelSnapshot:
    """What a captured graph took for granted about a model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._attributes = {name: plain_attributes(name, module) for name, module in self._modules.items()}
        self._tensors = {name: _metadata(tensor) for name, tensor in named_tensors(model).items()}

    def difference(self, model: nn.Module) -> str | None:
        """What a plan made at this snapshot would get wrong now; None when it still holds."""
        modules = dict(model.named_modules())
        if modules.keys() != self._modules.keys():
            changed = sorted(modules.keys() ^ self._modules.keys())
            return f"modules were added or removed ({', '.join(changed[:3])})"
        for name, module in modules.items():
            if module is not self._modules[name]:
                return f"module {name} was replaced"
            difference = _first_difference(self._attributes[name], plain_attributes(name, module))
            if difference is not None:
                return f"attribute {difference} of {name or 'the model'} changed"
        tensors = {name: _metadata(tensor) for name, tensor in named_tensors(model).items()}
        if tensors.keys() != self._tensors.keys():
            return f"weights were added or removed ({', '.join(sorted(tensors.keys() ^ self._tensors.keys())[:3])})"
        for name, metadata in tensors.items():
            if metadata != self._tensors[name]:
                return f"{name} changed from {_describe(self._tensors[name])} to {_describe(metadata)}"
        return None


def check_capturable(model: nn.Module) -> None:
    """Raise CaptureError where the model is in a state that no static graph can stand for."""
    for name, module in model.named_modules():
        if module.training:
            raise CaptureError(
                CaptureFailure(Obstacle.TRAINING, "call model.eval() first", node=name or type(model).__name__)
            )
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


def plain_attributes(path: str, module: nn.Module) -> dict[str, Any]:
    """What tracing may have read from a module besides its children, parameters and buffers.

    Containers and objects are copied one level deep; of a plain tensor its identity and layout count, its values are
    live only where it is changed in place. Hooks of the model itself (`path` is empty) run around the plan, so only
    its own forward counts.
    """
    plain: dict[str, Any] = {}
    if path:
        plain["hooks"] = _hooks_of(module)
    else:
        plain["forward"] = getattr(own_forward(module), "__func__", own_forward(module))
    for name, value in module.__dict__.items():
        if name in _OF_EVERY_MODULE or (name in ("forward", "_old_forward") and not path):
            continue
        plain[name] = _opened(value)
    return plain


def _opened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value, *_metadata(value))
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set)):
        return type(value)(value)
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, ModuleType, MethodType)):
        return (value, dict(value.__dict__))
    return value


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    for name in before.keys() | now.keys():
        if name not in before or name not in now or not _same(before[name], now[name]):
            return name
    return None


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _SCALARS):
        return bool(a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, set):
        return bool(a == b)
    return False


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by dotted name, shared ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _metadata(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, type(tensor))


def _describe(metadata: tuple[Any, ...]) -> str:
    shape, _, dtype, device, _ = metadata
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"
