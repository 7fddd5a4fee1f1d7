"""A fingerprint of all that tracing bakes in about a model, equal across processes, for plan files.

Parameters count by their layout only. (A schedule's fingerprint covers the config alone: `schedule.fingerprint`.)

Hazard: anything left out can change unnoticed, and a saved plan then gives wrong images. So code is represented by the
bytes of the files that define the classes and functions, and by the versions of their packages (for what those files
import); and an attribute whose value cannot be determined is an error.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from harmonica_rt.errors import PlanFileError
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.scope import own_attributes
from harmonica_rt.model.tensors import named_tensors, shared_names

_SCALARS = (
    type(None), bool, int, float, complex, str, bytes, range, type(...), enum.Enum, np.generic,
    torch.dtype, torch.layout, torch.memory_format,
)  # fmt: skip
_NO_CODE = frozenset({"builtins", "torch", "numpy", "collections"})  # packages identified by their version, if any
_CONFIG = "_internal_dict"  # where diffusers' models keep their config


def digest(model: nn.Module) -> str:
    """A digest of classes, code, module tree, attributes and the layout of tensors: `sha256:` and 64 hex digits.

    Raises:
        PlanFileError: the value of an attribute, or the code of a class, cannot be determined.
    """
    text = hashlib.sha256()
    for line in _Description(model).lines():
        text.update(line.encode())
        text.update(b"\n")
    return f"sha256:{text.hexdigest()}"


class _Description:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._open: set[int] = set()  # containers being described, since some contain themselves
        self._origins: set[str] = set()

    def lines(self) -> Iterator[str]:
        for path, module in self._model.named_modules():
            yield f"module {path} {self._name(type(module))}"
            if not path:
                yield f"forward {self._text(own_forward(module))}"
            for name in own_attributes(module, root=not path):
                try:
                    yield f"{name} = {self._attribute(name, module.__dict__[name])}"
                except PlanFileError as error:
                    raise PlanFileError(f"{path or type(module).__name__}.{name}: {error}") from error
        tensors = named_tensors(self._model)
        for name, tensor in tensors.items():
            yield f"tensor {name} {_layout(tensor)}"
        yield f"shared {shared_names(tensors)}"
        yield from sorted(self._origins)

    def _attribute(self, name: str, value: Any) -> str:
        if name == _CONFIG:  # its private keys say where the model came from, not what it is
            value = {key: item for key, item in value.items() if not key.startswith("_")}
        return self._text(value)

    def _text(self, value: Any) -> str:
        if isinstance(value, torch.device):
            return f"device {value.type}"  # plans move with the model
        if isinstance(value, _SCALARS):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, torch.Tensor):
            return f"{_layout(value)} {_bytes_of(value)}"
        if isinstance(value, nn.Module) and id(value) in self._paths:
            return f"module {self._paths[id(value)]}"
        if isinstance(value, type):
            return self._name(value)
        if isinstance(value, (ModuleType, BuiltinFunctionType)):
            return _qualified(value)
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return self._container(value)
        finally:
            self._open.remove(id(value))

    def _container(self, value: Any) -> str:
        if isinstance(value, nn.Module):
            return digest(value)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
        if isinstance(value, (set, frozenset)):
            return self._many(sorted(self._text(item) for item in value))
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__} {self._many(map(self._text, value))}"
        if isinstance(value, slice):
            return f"slice {self._many(map(self._text, (value.start, value.stop, value.step)))}"
        if isinstance(value, functools.partial):
            return f"partial {self._many(map(self._text, (value.func, value.args, value.keywords)))}"
        if isinstance(value, MethodType):
            return f"method {self._many(map(self._text, (value.__func__, value.__self__)))}"
        if isinstance(value, FunctionType):
            return self._function(value)
        entries = _entries(value)
        if entries is None:
            raise PlanFileError(f"a {type(value).__name__} does not show its contents, so a change would go unnoticed")
        described = (f"{key!r}: {self._text(item)}" for key, item in entries.items())
        return f"{self._name(type(value))} {self._many(described)}"

    def _function(self, function: FunctionType) -> str:
        code = function.__code__
        self._note(function.__module__, code.co_filename)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        parts = (function.__defaults__, function.__kwdefaults__, cells)
        return f"{_qualified(function)}:{code.co_firstlineno} {self._many(map(self._text, parts))}"

    def _name(self, cls: type) -> str:
        for base in cls.__mro__:
            package = base.__module__.partition(".")[0]
            if package in _NO_CODE or package == "typing":
                continue
            try:
                self._note(base.__module__, inspect.getfile(base))
            except (TypeError, OSError) as error:
                if package in sys.stdlib_module_names and package != "__main__":
                    continue
                raise PlanFileError(
                    f"the class {_qualified(base)} is not defined in a file, so a change of it would go unnoticed"
                ) from error
        return _qualified(cls)

    def _note(self, module: str, file: str) -> None:
        package = module.partition(".")[0]
        if package in sys.stdlib_module_names and package != "__main__":
            return
        self._origins.add(f"package {package} {getattr(sys.modules.get(package), '__version__', '')}")
        self._origins.add(f"code {module} {_code(file)}")

    def _many(self, items: Iterable[str]) -> str:
        return "(" + ", ".join(items) + ")"


def _entries(value: Any) -> dict[Any, Any] | None:
    """The contents of an object: a dict's entries, or attributes and slots; None if it shows neither."""
    if isinstance(value, dict):
        return value
    slots = [name for cls in type(value).__mro__ for name in _names(cls.__dict__.get("__slots__", ()))]
    held = {
        name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    }
    if hasattr(value, "__dict__"):
        held.update(vars(value))
    return held if held or hasattr(value, "__dict__") or "__slots__" in type(value).__dict__ else None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.lru_cache(maxsize=512)
def _code(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise PlanFileError(f"the code in {file} cannot be read, so a change of it would go unnoticed") from error


def _qualified(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', getattr(thing, '__name__', thing))}"


def _layout(tensor: torch.Tensor) -> str:
    kind = _qualified(type(tensor))
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device.type} {kind}"


def _bytes_of(tensor: torch.Tensor) -> str:
    if tensor.device.type == "meta":
        return "without values"
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()
