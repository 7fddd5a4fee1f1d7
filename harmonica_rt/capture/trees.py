"""Nested containers of calls and results as JSON. Classes are looked up among those imported; none is imported."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch.utils import _pytree as pytree

from harmonica_rt.errors import PlanFileError


def encode_tree(spec: pytree.TreeSpec) -> Any:
    """The structure as plain JSON values; leaves are their numbers.

    Raises:
        PlanFileError: another container than a list, tuple, dict with names, named tuple or registered dataclass.
    """
    return _encode(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def decode_tree(value: Any) -> pytree.TreeSpec:
    """The structure that `encode_tree` was given.

    Raises:
        PlanFileError: a class that is not imported, or is no container.
        KeyError, TypeError, ValueError: not what `encode_tree` wrote.
    """
    leaves, spec = pytree.tree_flatten(_decode(value))
    if leaves != list(range(len(leaves))):
        raise ValueError(f"leaves in another order: {leaves}")
    return spec


def _encode(tree: Any) -> Any:
    kind = type(tree)
    if kind is int:
        return tree
    if kind in (list, tuple):
        return {kind.__name__: [_encode(item) for item in tree]}
    if kind is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _encode(item) for key, item in tree.items()}}
    fields = _fields(tree)
    if fields is None:
        raise PlanFileError(f"a plan for calls or results with a {kind.__name__} cannot be saved")
    return {"class": [kind.__module__, kind.__qualname__], "fields": {key: _encode(fields[key]) for key in fields}}


def _fields(tree: Any) -> dict[str, Any] | None:
    """The arguments that make an object of this class again; None where it is no container known to pytree."""
    if _is_named_tuple(type(tree)):
        return dict(tree._asdict())
    if type(tree) not in pytree.SUPPORTED_NODES:
        return None
    if isinstance(tree, dict):  # diffusers' and transformers' outputs are dicts of what they were given
        return dict(tree) if all(isinstance(key, str) for key in tree) else None
    if dataclasses.is_dataclass(tree):
        return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
    return None


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _decode(value: Any) -> Any:
    if isinstance(value, int):
        return value
    if "class" in value:
        return _container(*value["class"])(**{key: _decode(item) for key, item in value["fields"].items()})
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode(item) for key, item in content.items()}
    items = [_decode(item) for item in content]
    return {"list": list, "tuple": tuple}[kind](items)


def _container(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, type) or not (found in pytree.SUPPORTED_NODES or _is_named_tuple(found)):
        raise PlanFileError(f"{module}.{qualname} is no container that is imported here; import it before loading")
    return found
