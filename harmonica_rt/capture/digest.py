"""A fingerprint of everything that tracing reads from a model, equal across processes; the weights' values left out."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from harmonica_rt.capture.snapshot import named_tensors, plain_attributes

_SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_DEPTH = 4  # of containers and objects that are looked into


def digest(model: nn.Module) -> str:
    """Of classes, module tree, plain attributes and the layout of weights: `sha256:` and 64 hex digits."""
    text = hashlib.sha256()
    for line in _lines(model):
        text.update(line.encode())
        text.update(b"\n")
    return f"sha256:{text.hexdigest()}"


def _lines(model: nn.Module) -> Iterator[str]:
    package = sys.modules.get(type(model).__module__.partition(".")[0])
    yield f"package {getattr(package, '__version__', '')}"
    for path, module in model.named_modules():
        yield f"module {path} {_name(type(module))}"
        for name, value in sorted(plain_attributes(path, module).items()):
            yield f"{name} = {_text(value, _DEPTH)}"
    for name, tensor in named_tensors(model).items():
        yield f"tensor {name} {_layout(tensor)}"


def _text(value: Any, depth: int) -> str:
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return _layout(value)
    if depth == 0:
        return _name(type(value))
    if isinstance(value, dict):
        # What begins with an underscore in a config says where the model came from, not what it is.
        entries = {repr(key): item for key, item in value.items() if not str(key).startswith("_")}
        return _entries(entries, depth)
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(_text(item, depth - 1) for item in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item, depth - 1) for item in value) + "]"
    if hasattr(value, "__qualname__"):
        return _name(value)
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return _name(type(value))
    return f"{_name(type(value))} {_entries(vars(value), depth)}"


def _entries(entries: dict[str, Any], depth: int) -> str:
    return "{" + ", ".join(f"{key}: {_text(item, depth - 1)}" for key, item in sorted(entries.items())) + "}"


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"


def _layout(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device.type} {_name(type(tensor))}"
