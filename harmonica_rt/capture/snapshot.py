"""Has the model changed since it was captured?

A captured graph bakes in the module tree, every plain attribute read while tracing (LoRA scales, attention processors,
flags) and the metadata of the weights, but not the values of the weights. So those may change freely; the rest makes
the graph stale, and stale graphs give wrong images silently. Attributes are looked at one level deep: what lies deeper
(a list in a dict in an object) is not seen. Checked at the first call of a run, not each step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harmonica_rt.capture.forward import own_forward
from harmonica_rt.capture.reasons import CaptureError, CaptureFailure, Obstacle

_SCALARS = (type(None), bool, int, float, str, torch.device)

# Parameters, buffers and children are compared by themselves; hooks and accelerate's wrapper by what they are.
_OF_EVERY_MODULE = frozenset((*nn.Module().__dict__, "_compiled_call_impl", "_hf_hook", "_diffusers_hook")) - {
    "training"
}
_LOOKED_INTO = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class ModelSnapshot:
    """What a captured graph took for granted about a model.

    Attributes:
        tensors: its parameters and buffers by name, as they were when `difference` last looked.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._take_note(model)
        self._attributes = {name: plain_attributes(name, module) for name, module in self._modules.items()}
        self._layouts = {name: _metadata(tensor) for name, tensor in self.tensors.items()}
        self._shared = shared_names(self.tensors)

    def difference(self, model: nn.Module) -> str | None:
        """What a plan made at this snapshot would get wrong now; None when it still holds."""
        if _untouched(self._records) and self._layouts_hold(self.tensors) is None and self._plain_layouts_hold():
            return None
        difference = self._difference(model)
        if difference is None:
            self._take_note(model)
        return difference

    def _take_note(self, model: nn.Module) -> None:
        """Remember every object that is looked at, so that a model nobody touched is recognised at once."""
        self.tensors = named_tensors(model)
        self._records = [record for module in self._modules.values() for record in _records_of(module)]
        self._plain = [(tensor, _metadata(tensor)) for tensor in plain_tensors(model).values()]

    def _plain_layouts_hold(self) -> bool:
        return all(_metadata(tensor) == metadata for tensor, metadata in self._plain)

    def _layouts_hold(self, tensors: dict[str, torch.Tensor]) -> str | None:
        for name, tensor in tensors.items():
            if (metadata := _metadata(tensor)) != self._layouts[name]:
                return f"{name} changed from {_describe(self._layouts[name])} to {_describe(metadata)}"
        return None

    def _difference(self, model: nn.Module) -> str | None:
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
        tensors = named_tensors(model)
        if tensors.keys() != self._layouts.keys():
            return f"weights were added or removed ({', '.join(sorted(tensors.keys() ^ self._layouts.keys())[:3])})"
        if shared_names(tensors) != self._shared:
            return "weights were tied, or are no longer"
        return self._layouts_hold(tensors)


# A container, how to look at what is in it, and the very objects that were.
_Record = tuple[Any, Callable[[], Iterable[Any]], tuple[Any, ...]]


def _untouched(records: list[_Record]) -> bool:
    """Whether every container holds the same objects, in the same order. A model has thousands: this loop is hot."""
    for container, values, items in records:
        if len(container) != len(items) or not all(map(operator.is_, values(), items)):
            return False
    return True


def _records_of(module: nn.Module) -> Iterator[_Record]:
    """Of a module's own attributes and of every container or object among them, as deep as `plain_attributes` looks."""
    yield _record(module.__dict__)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if is_traceable_wrapper_subclass(tensor):
            yield _record(_Parts(tensor))
    registry = module.__dict__.get("_diffusers_hook")
    if registry is not None:
        yield _record(registry.hooks)
    for name, value in module.__dict__.items():
        if name in _OF_EVERY_MODULE and name not in _LOOKED_INTO:
            continue
        if isinstance(value, (dict, list, set)):
            yield _record(value)
            if isinstance(value, dict) and name not in _LOOKED_INTO:
                yield value, value.keys, tuple(value)
        elif _is_opened(value):
            yield _record(value.__dict__)


def _record(container: Any) -> _Record:
    values = container.values if isinstance(container, dict) else container.__iter__
    return container, values, tuple(values())


def check_capturable(model: nn.Module) -> None:
    """Raise CaptureError where the model is in a state that no static graph can stand for."""
    if model.training:
        raise CaptureError(CaptureFailure(Obstacle.TRAINING, "call model.eval() first", node=type(model).__name__))
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
    if _is_opened(value):
        return (value, dict(value.__dict__))
    return value


def _is_opened(value: Any) -> bool:
    """Whether a value is an object whose attributes tracing may have read."""
    return hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, nn.Module, type, ModuleType, MethodType))


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
    """All parameters and buffers by dotted name, shared ones under each of their names.

    One that is made of others (a quantised weight) comes with those, under the names that torch.export has for them.
    """
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in list(found.items()):
        path, _, own = name.rpartition(".")
        for index, inner in enumerate(_inner_tensors(tensor)):
            found[f"{path}{'.' if path else ''}parametrizations.{own}.original{index}"] = inner
    return found


def _inner_tensors(tensor: Any) -> list[torch.Tensor]:
    """What a tensor is made of, down to plain ones, in the order of torch.export; nothing for a plain one."""
    if not is_traceable_wrapper_subclass(tensor):
        return []
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [inner for part in parts for inner in (_inner_tensors(part) or [part])]


class _Parts:
    """The tensors that a weight is made of now; `module.to()` puts others into the same weight."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __len__(self) -> int:
        return len(_inner_tensors(self._tensor))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(_inner_tensors(self._tensor))


def shared_names(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of each tensor that has several names, all names but the first, with the first."""
    first: dict[int, str] = {}
    return {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors among the attributes of modules that are neither parameters nor buffers, by dotted name."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if isinstance(value, torch.Tensor)
    }


def _metadata(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, type(tensor))


def _describe(metadata: tuple[Any, ...]) -> str:
    shape, _, dtype, device, _ = metadata
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"
