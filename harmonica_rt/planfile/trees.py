"""Nested containers of calls and results as JSON.

A file names classes of containers. Each is looked up among those already imported, without triggering a module's
`__getattr__`, and has to be a named tuple, or a dict or dataclass that is registered with pytree.
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

from torch.utils import _pytree as pytree

from harmonica_rt.errors import PlanFileError
from harmonica_rt.planfile.json_fields import fields_of, integer_of, items_of, refused, text_of
from harmonica_rt.untrusted.text import quoted


def encode_tree(spec: pytree.TreeSpec) -> Any:
    """The structure as plain JSON values; each leaf becomes its index.

    Raises:
        PlanFileError: a container is not a list, tuple, dict with string keys, named tuple, or dict class or dataclass
            that is registered with pytree.
    """
    return _encode(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def decode_tree(value: Any, where: str = "tree") -> pytree.TreeSpec:
    """The structure that `encode_tree` encoded.

    Raises:
        PlanFileError: the value is not in the form that `encode_tree` writes, or a class is not imported or not a
            container.
    """
    leaves, spec = pytree.tree_flatten(_decode(value, where))
    if leaves != list(range(len(leaves))):
        raise refused(where, "leaves numbered in order", leaves)
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
    """The constructor arguments that recreate an object; None if it is not a container known to pytree."""
    if not _is_container(type(tree)):
        return None
    if _is_named_tuple(type(tree)):
        return dict(tree._asdict())
    if isinstance(tree, dict):  # diffusers' and transformers' outputs are dicts of their constructor arguments
        return dict(tree) if all(isinstance(key, str) for key in tree) else None
    return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}


def _is_container(kind: type) -> bool:
    """Whether objects of a class are made from their fields, and pytree can flatten them."""
    if _is_named_tuple(kind):
        return True
    return kind in pytree.SUPPORTED_NODES and (issubclass(kind, dict) or dataclasses.is_dataclass(kind))


def _is_named_tuple(kind: type) -> bool:
    """Whether a class is itself a named tuple (no subclass of one), so that its constructor only stores its fields."""
    return kind.__bases__ == (tuple,) and isinstance(vars(kind).get("_fields"), tuple)


def _decode(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return integer_of(value, where)
    if "class" in value:
        entry = fields_of(value, where, ("class", "fields"))
        kind = _container(entry["class"], where)
        fields = entry["fields"]
        if not isinstance(fields, dict):
            raise refused(f"{where}.fields", "an object", fields)
        made = {key: _decode(item, f"{where}.{quoted(key)}") for key, item in fields.items()}
        try:
            return kind(**made)
        except (TypeError, ValueError) as error:
            raise refused(where, f"the fields of a {kind.__qualname__}", list(made)) from error
    if len(value) != 1:
        raise refused(where, "an object with one field", value)
    ((name, content),) = value.items()
    if name == "dict":
        if not isinstance(content, dict):
            raise refused(where, "an object", content)
        return {key: _decode(item, f"{where}.{quoted(key)}") for key, item in content.items()}
    if name not in ("list", "tuple"):
        raise refused(where, "the field list, tuple, dict or class", name)
    items = [_decode(item, f"{where}[{i}]") for i, item in enumerate(items_of(content, where))]
    return items if name == "list" else tuple(items)


def _container(value: Any, where: str) -> Any:
    names = [text_of(name, where) for name in items_of(value, where)]
    if len(names) != 2:
        raise refused(where, "a module and the name of a class in it", value)
    found: Any = sys.modules.get(names[0])
    for name in names[1].split("."):
        # not getattr: a module may import others when asked for a name
        found = vars(found).get(name) if isinstance(found, (ModuleType, type)) else None
    if not isinstance(found, type) or not _is_container(found):
        raise PlanFileError(
            f"{where}: {quoted('.'.join(names))} is not an imported container class; import it before loading"
        )
    return found
