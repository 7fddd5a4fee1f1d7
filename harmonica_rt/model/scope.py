"""Which attributes, classes and packages count as a part of a model, and which are assumed not to change.

Packages whose code is not the model's (torch, the standard library) are trusted to stay the same: their functions count
by identity, so that a replaced one is noticed, and are not followed.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, GenericAlias, ModuleType
from typing import Any

from torch import nn

from harmonica_rt.model.hooks import ACCELERATE_HOOK, DIFFUSERS_HOOKS

CLOSED = (sys.stdlib_module_names | {"torch", "numpy", "harmonica_rt", "harmonica_kernels"}) - {"__main__"}
# modules in CLOSED packages whose objects just hold attributes
_PLAIN_OBJECTS = frozenset({"types", "argparse", "collections", "dataclasses", "os", "queue", "weakref", "_thread"})

# Attributes of every module that a forward does not use, or that are handled separately.
UNUSED = frozenset((*nn.Module().__dict__, "_compiled_call_impl")) - {"training", "_parameters", "_buffers", "_modules"}
# Likewise for the model itself: what runs around a plan. Its innermost forward is handled separately.
UNUSED_OF_ROOT = UNUSED | {"forward", "_old_forward", ACCELERATE_HOOK, DIFFUSERS_HOOKS}
_NOT_OF_A_CLASS = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__hash__", "__slots__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__orig_bases__"),
        *("__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__match_args__"),
        *("__dataclass_fields__", "__dataclass_params__", "__parameters__"),
        "__slotnames__",  # copying or pickling an object stores it in the class
    )
)
# Methods that are called without being named: these, and all dunder methods (Python's syntax calls them) except
# `_NOT_CALLED`.
CALLED_UNNAMED = ("forward",)
_NOT_CALLED = frozenset(
    (
        *("__repr__", "__str__", "__format__", "__dir__", "__sizeof__", "__del__", "__init_subclass__", "__set_name__"),
        *("__class_getitem__", "__subclasshook__", "__prepare__", "__copy__", "__deepcopy__", "__reduce__"),
        *("__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"),
    )
)
_HEAP_TYPE = 1 << 9


def own_attributes(module: nn.Module, *, root: bool) -> list[str]:
    """Names of a module's attributes, except parameters, buffers, children, hooks and what runs around the root."""
    held_apart = {"_parameters", "_buffers", "_modules", ACCELERATE_HOOK, DIFFUSERS_HOOKS}
    return sorted(module.__dict__.keys() - (UNUSED_OF_ROOT if root else UNUSED) - held_apart)


def class_attributes(cls: type) -> dict[str, Any]:
    """The attributes of a class that a forward may use."""
    return {key: value for key, value in cls.__dict__.items() if key not in _NOT_OF_A_CLASS}


def is_called_by_python(method: str) -> bool:
    """Whether Python itself calls methods of this name while a forward runs, for its syntax."""
    return method.startswith("__") and method.endswith("__") and method not in _NOT_CALLED


def is_opened(value: Any) -> bool:
    """Whether to visit an object's attributes: they are a user's settings, not the internals of a library."""
    if isinstance(value, (ModuleType, BuiltinFunctionType, GenericAlias)):
        return False
    package = package_of(type(value))
    return package not in CLOSED or type(value).__module__ in _PLAIN_OBJECTS


def is_written_in_python(cls: type) -> bool:
    """Whether a class was made by a `class` statement; one written in C may hold more than it shows."""
    return bool(cls.__flags__ & _HEAP_TYPE)


def package_of(thing: Any) -> str:
    """The top-level package that a class or function belongs to."""
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]
