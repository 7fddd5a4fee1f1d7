"""Pairs of numbers: how models take tensors apart into the halves of their pairs, and put them together again.

The numbers of a pair are neighbours, or half a row apart. Views are followed by their shapes and dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import arguments_of, is_item, value_of
from harmonica_rt.lower.casts import unwidened

aten = torch.ops.aten

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
LISTS_OF_VIEWS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Half:
    """The first or the second numbers of all pairs of `x`, [..., D / 2], or their negatives."""

    x: fx.Node
    second: bool
    interleaved: bool
    negative: bool = False


def half_of(node: fx.Node) -> Half | None:
    """What `node` holds of the pairs of a tensor, if it holds one number of each."""
    node = unwidened(node)
    if node.target is aten.neg.default:
        inner = half_of(node.args[0])  # type: ignore[arg-type]
        return None if inner is None else replace(inner, negative=not inner.negative)
    found = _sliced(node) or _taken(node)
    if found is None:
        return None
    wanted = value_of(found.x).shape
    return found if value_of(node).shape == (*wanted[:-1], wanted[-1] // 2) else None


def _sliced(node: fx.Node) -> Half | None:
    """A half that was cut out of `x`: half of its columns, or every second one."""
    if node.target is aten.slice.Tensor:
        given = arguments_of(node)
        x = given["self"]
        width = value_of(x).shape[-1]
        if given["dim"] % value_of(x).dim() + 1 != value_of(x).dim() or width % 2:
            return None
        start, end, _ = slice(given["start"], given["end"]).indices(width)
        found = {(0, width // 2, 1): (False, False), (width // 2, width, 1): (True, False)}
        found |= {(0, width, 2): (False, True), (1, width, 2): (True, True)}
        half = found.get((start, end, given["step"]))
        return None if half is None else Half(x, *half)
    views: Any = node.args[0] if is_item(node) else None
    if views is not None and views.target in LISTS_OF_VIEWS:
        given = arguments_of(views)
        x, values = given["self"], value_of(views)
        if len(values) != 2 or given["dim"] % value_of(x).dim() + 1 != value_of(x).dim():
            return None
        return Half(x, bool(node.args[1]), False) if value_of(x).shape[-1] % 2 == 0 else None
    return None


def _taken(node: fx.Node) -> Half | None:
    """A half that was taken from `x` reshaped to pairs."""
    views: Any = node.args[0] if is_item(node) else None
    if views is not None and views.target is aten.unbind.int:
        source, index = arguments_of(views), node.args[1]
    elif node.target is aten.select.int:
        source, index = arguments_of(node), node.args[2]
    else:
        return None
    split, dim = source["self"], source["dim"]
    if split.target not in RESHAPES or index not in (0, 1):
        return None
    x, dims = split.args[0], value_of(split).dim()
    interleaved = dim % dims == dims - 1
    if dim % dims < dims - 2 or not splits(split, value_of(x).shape, interleaved=interleaved):
        return None
    return Half(x, bool(index), interleaved)


def splits(node: fx.Node, shape: torch.Size, *, interleaved: bool) -> bool:
    """Whether `node` has this shape with the last dimension split into pairs."""
    if not shape or shape[-1] % 2:
        return False
    split = (shape[-1] // 2, 2) if interleaved else (2, shape[-1] // 2)
    return bool(value_of(node).shape == (*shape[:-1], *split))


BothHalves = tuple[tuple[fx.Node, bool], tuple[fx.Node, bool]]


def joined_halves(node: fx.Node) -> BothHalves | None:
    """What `node` puts together by `stack` or `cat` as the numbers of its pairs, each with whether as neighbours."""
    interleaved = node.target in RESHAPES
    source = node.args[0] if interleaved else node
    target = aten.stack.default if interleaved else aten.cat.default
    if not isinstance(source, fx.Node) or source.target is not target:
        return None
    if interleaved and not splits(source, value_of(node).shape, interleaved=True):
        return None
    tensors: Any = source.args[0]
    dim = arguments_of(source)["dim"]
    if (
        not isinstance(tensors, (list, tuple))
        or len(tensors) != 2
        or dim % value_of(source).dim() + 1 != value_of(source).dim()
    ):
        return None
    one, other = tensors
    if value_of(one).shape != value_of(other).shape:
        return None
    return (one, interleaved), (other, interleaved)


def written_halves(node: fx.Node) -> BothHalves | None:
    """What `node` holds in its even and odd columns, if both were written to it; with the same flags."""
    columns: dict[int, fx.Node] = {}
    while node.target is aten.slice_scatter.default:
        given = arguments_of(node)
        width, dims = value_of(node).shape[-1], value_of(node).dim()
        start = given["start"] or 0
        is_whole = given["step"] == 2 and start in (0, 1) and (given["end"] is None or given["end"] >= width)
        if given["dim"] % dims + 1 != dims or width % 2 or not is_whole or start in columns:
            return None
        columns[start] = written_value(given["src"])
        node = given["input"] if "input" in given else given["self"]
    return ((columns[0], True), (columns[1], True)) if len(columns) == 2 else None


def written_value(node: fx.Node) -> fx.Node:
    """What an in-place write put into `node`; the node itself if it is none."""
    if node.target is aten.copy.default:
        source = node.args[1]
        if isinstance(source, fx.Node) and value_of(source).shape == value_of(node).shape:
            return source
    return node
