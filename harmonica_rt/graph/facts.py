"""Answers questions about the nodes of a `torch.fx` graph, each of them here and nowhere else.

All functions only read the graph. A node's fake tensor, or list of them, is its *value*. (What the glossary calls
*facts* is something else, and is in `harmonica_rt/model/facts.py`.)
"""

from __future__ import annotations

import operator
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx


def value_of(node: fx.Node) -> Any:
    """The fake tensor (or list of them) that a node stands for."""
    return node.meta["val"]


def device_of(node: fx.Node) -> torch.device | None:
    """The device of a node's value; None if the value is not a single tensor."""
    value = node.meta.get("val")
    return value.device if isinstance(value, torch.Tensor) else None


def is_mutating(node: fx.Node) -> bool:
    """Whether the node's operator writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operator by name, defaults filled in."""
    target: Any = node.target
    arguments = target._schema.arguments
    given = {argument.name: arg for argument, arg in zip(arguments, node.args, strict=False)}
    return {**{argument.name: argument.default_value for argument in arguments}, **given, **node.kwargs}


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses this one; None if none or several do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one value out of the result of another node."""
    return node.target is operator.getitem


def is_view(node: fx.Node) -> bool:
    """Whether a node is a view by its operator's schema, or taken out of a list of views."""
    if is_item(node):
        return is_view(node.args[0])  # type: ignore[arg-type]
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)


def owner(node: fx.Node) -> fx.Node:
    """The node whose memory a value lies in, found by following views and items back to what they were taken from."""
    while is_view(node) or is_item(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def may_alias_argument(node: fx.Node) -> bool:
    """Whether a value may share memory with an argument of the graph, by the operators' schemas."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op != "call_function":
            return True
        if current not in seen and _may_return_alias(current.target):
            pending.extend(current.all_input_nodes)
        seen.add(current)
    return False


def _may_return_alias(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # such as getitem: assume the worst
    if any(argument.alias_info is not None for argument in target._schema.arguments):
        return True
    # reshape, to, contiguous and other composites return their input or a copy, which their schema does not say
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def needed_nodes(
    roots: Iterable[Any], cut: Collection[fx.Node] = (), bases: Mapping[fx.Node, fx.Node] = types.MappingProxyType({})
) -> set[fx.Node]:
    """The roots that are nodes, and all nodes that they depend on.

    The search goes on from a `cut` node only to its base, if it has one.
    """
    needed: set[fx.Node] = set()
    pending = [root for root in roots if isinstance(root, fx.Node)]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in cut:
            pending.extend(node.all_input_nodes)
        elif node in bases:
            pending.append(bases[node])
    return needed
