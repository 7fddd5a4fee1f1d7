"""Matches the nodes of a graph against declared patterns.

A pattern is a tree: `Op` for a call of an operator, `Operand` for any node, `Number` for a number, `LastDim` for the
last dimension, `Anything` for whatever stands there, and a plain value for itself. A match binds the names in the
pattern to what stands in their places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import arguments_of, value_of

Bound = Mapping[str, Any]  # name in a pattern -> the node or number in its place


@dataclass(frozen=True)
class Operand:
    """Any node. If a name occurs several times in a pattern, it must be the same node each time."""

    name: str


@dataclass(frozen=True)
class Number:
    """A Python number."""

    name: str


@dataclass(frozen=True)
class Anything:
    """Any argument, even one that is left at its default."""


@dataclass(frozen=True)
class LastDim:
    """A list that holds only the last dimension of the call's first argument."""


@dataclass(frozen=True)
class Op:
    """A call of one of `targets`; arguments that are not listed have their default values.

    Attributes:
        targets: overloads, all with arguments in the same order.
        args: a pattern for each of the first arguments.
        commutes: whether the first two arguments may also be swapped.
    """

    targets: tuple[torch._ops.OpOverload, ...]
    args: tuple[Any, ...]
    commutes: bool = False


def matches(pattern: Any, node: fx.Node) -> Iterator[Bound]:
    """Every way in which the value of `node` matches `pattern`; nodes inside the match have no users outside it."""
    yield from _matches(pattern, node, {})


def _matches(pattern: Any, value: Any, bound: Bound) -> Iterator[Bound]:
    if isinstance(pattern, Operand):
        if isinstance(value, fx.Node) and bound.get(pattern.name, value) is value:
            yield {**bound, pattern.name: value}
    elif isinstance(pattern, Number):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield {**bound, pattern.name: float(value)}
    elif isinstance(pattern, Anything):
        yield bound
    elif isinstance(pattern, Op):
        if isinstance(value, fx.Node) and value.target in pattern.targets:
            yield from _calls(pattern, value, bound)
    elif isinstance(value, bool) is isinstance(pattern, bool) and not isinstance(value, fx.Node) and value == pattern:
        yield bound


def _calls(pattern: Op, node: fx.Node, bound: Bound) -> Iterator[Bound]:
    """Match a call of one of the targets, with both orders of its first two arguments if they commute."""
    arguments = arguments_of(node)
    defaults = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    names = list(arguments)
    listed, others = names[: len(pattern.args)], names[len(pattern.args) :]
    if any(arguments[name] != defaults[name] for name in others):
        return
    given = [arguments[name] for name in listed]
    orders = [given, [given[1], given[0], *given[2:]]] if pattern.commutes else [given]
    for order in orders:
        yield from _each(list(zip(pattern.args, order, strict=True)), node, bound)


def _each(pairs: list[tuple[Any, Any]], node: fx.Node, bound: Bound) -> Iterator[Bound]:
    """Match the arguments of `node`, given as pairs (pattern, argument), one after the other."""
    if not pairs:
        yield bound
        return
    (pattern, value), *rest = pairs
    if isinstance(pattern, LastDim):
        found: Iterator[Bound] = iter([bound] if _is_last_dim(value, node) else [])
    elif isinstance(pattern, Op) and isinstance(value, fx.Node) and len(value.users) != 1:
        return
    else:
        found = _matches(pattern, value, bound)
    yield from itertools.chain.from_iterable(_each(rest, node, each) for each in found)


def _is_last_dim(dims: Any, node: fx.Node) -> bool:
    source = next(iter(arguments_of(node).values()))
    return isinstance(dims, (list, tuple)) and list(dims) in ([-1], [value_of(source).dim() - 1])
