"""Follows residual additions: which value a tensor still is after something was added to it.

A block adds to what enters it: `x + attention(x)`, then `+ feed_forward(...)`. The value that enters is the *origin* of
what leaves. Additions keep the origin, and so do casts, clamps, and views of the same shape; values that were joined
and split at the same places, or split and joined again, keep theirs. All other operators end it. Where
both operands of an addition have an origin, that of the first counts.

The rules hold for nodes of a graph as for tensors, so that a captured graph and the eager reference agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Whole:
    """The origin is one value: `value` is a node, or a number that the caller gave a tensor."""

    value: Any


@dataclass(frozen=True)
class Part:
    """A piece of a value with an origin: places `start` to `stop - 1` of the `size` that it has along `dim`."""

    of: Origin
    dim: int
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Joined:
    """Several values were joined along `dim`; each has its size and its origin."""

    dim: int
    parts: tuple[tuple[int, Origin | None], ...]


Origin = Whole | Part | Joined

_KEEPING = frozenset(
    f"aten::{name}"
    for name in (
        *("add", "sub", "addcmul", "clamp", "clip", "nan_to_num", "dropout", "clone", "contiguous", "detach", "alias"),
        *("to", "_to_copy", "type_as", "view", "reshape", "_unsafe_view", "view_as", "expand", "lift_fresh"),
    )
)
_JOINING = frozenset(("aten::cat", "aten::concat", "aten::concatenate"))
_TAKING = frozenset(("aten::slice", "aten::narrow"))
_SPLITTING = frozenset(
    f"aten::{name}" for name in ("split", "split_with_sizes", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split")
)


def origin_after(
    target: Any,
    args: Sequence[Any],
    result: Sequence[Sequence[int]],
    origin_of: Callable[[Any], Origin | None],
    shape_of: Callable[[Any], Sequence[int] | None],
) -> list[Origin | None]:
    """The origin of each result of one operator.

    Args:
        target: the operator.
        args: its positional arguments.
        result: the shape of each result; one for an operator that returns a tensor.
        origin_of: the origin of an argument; None if it has none.
        shape_of: the shape of an argument; None if it is no tensor.
    """
    none: list[Origin | None] = [None] * len(result)
    name = target._schema.name.removesuffix("_") if isinstance(target, torch._ops.OpOverload) else ""
    if name in _KEEPING:
        operands = args[:2] if name == "aten::add" else args[:1]
        kept = [origin_of(each) for each in operands if shape_of(each) == result[0]]
        return [next((origin for origin in kept if origin is not None), None)]
    if name in _JOINING:
        dim = _dim(args[1] if len(args) > 1 else 0, result[0])
        return [_joined(dim, [(_size(shape_of(part), dim), origin_of(part)) for part in args[0]])]
    source = origin_of(args[0]) if name in _TAKING | _SPLITTING and args else None
    if source is None:
        return none
    place = 1 if name in _TAKING else 2
    dim = _dim(args[place] if len(args) > place else 0, result[0])
    size = _size(shape_of(args[0]), dim)
    if name in _SPLITTING:
        starts = [sum(_size(shape, dim) for shape in result[:index]) for index in range(len(result))]
    else:
        step = args[4] if name == "aten::slice" and len(args) > 4 else 1
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        if step != 1 or not isinstance(start, int):
            return none
        starts = [start + size if start < 0 else start]
    return [_piece(source, dim, start, _size(shape, dim), size) for start, shape in zip(starts, result, strict=True)]


def _joined(dim: int, parts: Sequence[tuple[int, Origin | None]]) -> Origin:
    """The origin of joined values: that of the value itself where they are all its pieces, in order."""
    inner = [origin.parts if isinstance(origin, Joined) and origin.dim == dim else [(n, origin)] for n, origin in parts]
    parts = [part for flat in inner for part in flat]
    pieces = [origin for _, origin in parts if isinstance(origin, Part) and origin.dim == dim]
    if len(pieces) == len(parts) and len({(piece.of, piece.size) for piece in pieces}) == 1:
        starts, stops = [piece.start for piece in pieces], [piece.stop for piece in pieces]
        if [*starts, pieces[0].size] == [0, *stops]:
            return pieces[0].of
    return Joined(dim, tuple(parts))


def _piece(source: Origin, dim: int, start: int, length: int, size: int) -> Origin | None:
    """The origin of a piece of a value with an origin; None where it has none."""
    if length == size:
        return source
    if isinstance(source, Part) and source.dim == dim:
        return Part(source.of, dim, source.start + start, source.start + start + length, source.size)
    if isinstance(source, Joined) and source.dim == dim:
        return _between(source, start, length)
    return Part(source, dim, start, start + length, size)


def _between(source: Joined, start: int, length: int) -> Origin | None:
    """The origin of a piece of joined values; None unless it begins and ends where parts do."""
    found: list[tuple[int, Origin | None]] = []
    place = 0
    for size, origin in source.parts:
        if start <= place and place + size <= start + length:
            found.append((size, origin))
        elif place < start + length and start < place + size:
            return None
        place += size
    return found[0][1] if len(found) == 1 else _joined(source.dim, found)


def _dim(dim: Any, shape: Sequence[int]) -> int:
    return dim % len(shape) if isinstance(dim, int) and shape else -1


def _size(shape: Sequence[int] | None, dim: int) -> int:
    return shape[dim] if shape is not None and dim < len(shape) else 0
