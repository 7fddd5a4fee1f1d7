"""Queries and keys as attention takes them: normed, rotated and joined from parts, as they stand in a graph.

Joint attention joins the parts of text and image before the rotation, after it, or by writing one into the other; some
models rotate only one of them. All of that is one list of parts, each a node with its own norm and tables.

Hazard: a norm over the last dimension commutes with views of the dimensions before it, and with no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import arguments_of, value_of
from harmonica_rt.lower.casts import arithmetic, unwidened
from harmonica_rt.lower.halves import RESHAPES, written_value
from harmonica_rt.lower.norm_pattern import Norm, find_norms, is_norm
from harmonica_rt.lower.rotary_pattern import Rotation, find_rotation

aten = torch.ops.aten

View = tuple[Any, tuple[Any, ...]]  # an operator, and its arguments after the tensor


@dataclass(frozen=True)
class Piece:
    """One part: `views` of `source`, normed and rotated.

    Attributes:
        source: what is normed, before the views.
        views: views to apply to it, in order.
        shape: its shape after them.
        norm: its norm; None where it has none.
        across: the norm is over the last two dimensions, which the views have made out of one.
        rotation: its rotation; None where it has none.
        narrowed: the dimension, start and end of the part of the rotation's tables that are its own; None for all.
    """

    source: fx.Node
    views: tuple[View, ...]
    shape: torch.Size
    norm: Norm | None = None
    across: bool = False
    rotation: Rotation | None = None
    narrowed: tuple[int, int, int] | None = None

    @property
    def operands(self) -> Iterator[fx.Node]:
        """The nodes that it is computed from."""
        norm = [] if self.norm is None else [self.norm.weight, self.norm.bias]
        tables = [] if self.rotation is None else [self.rotation.cos, self.rotation.sin]
        return (node for node in (self.source, *norm, *tables) if node is not None)


@dataclass(frozen=True)
class Prepared:
    """Queries or keys: `out` joins the pieces along `dim`, which is None where there is one piece."""

    out: fx.Node
    pieces: tuple[Piece, ...]
    dim: int | None

    @property
    def settings(self) -> tuple[Any, ...]:
        """What two of them must have in common to be computed by one call."""
        value = value_of(self.out)
        first = self.pieces[0]
        norm = None if first.norm is None else (first.norm.rms, first.norm.eps, first.across)
        rotations = {piece.rotation.interleaved for piece in self.pieces if piece.rotation is not None}
        return value.dtype, value.device, value.dim(), value.shape[-1], norm, rotations


def norms_by_result(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, Norm]]:
    """The norms of a graph, each by every node that holds its result, with what is normed."""
    found: dict[fx.Node, tuple[fx.Node, Norm]] = {}
    for node in graph.nodes:
        if is_norm(node):
            source = unwidened(node.args[0])
            found.update({norm.out: (source, norm) for norm in find_norms(source) if norm.scale is None})
    return found


def find_prepared(node: fx.Node, norms: Mapping[fx.Node, tuple[fx.Node, Norm]]) -> Prepared | str | None:
    """Match `node` as queries or keys that are normed or rotated.

    Returns:
        The match; or the reason, for one that the operator does not take; or None for anything else.
    """
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    pieces, dim = _pieces(node, norms)
    if all(piece.norm is None and piece.rotation is None for piece in pieces):
        return None
    kinds = {(p.norm is not None, p.norm and (p.norm.rms, p.norm.eps), p.across) for p in pieces}
    if len(kinds) > 1:  # a call has one norm: these stay outside of it
        pieces, dim = _pieces(node, {})
        if all(piece.rotation is None for piece in pieces):
            return "queries or keys: norms of several kinds"
    found = Prepared(node, tuple(pieces), dim)
    return _misfit(found) or found


def _misfit(found: Prepared) -> str | None:
    """Why the operator does not take a match; None where it does."""
    value = value_of(found.out)
    if any(value_of(p.source).dtype != value.dtype or value_of(p.source).device != value.device for p in found.pieces):
        return "queries or keys: dtypes or devices differ"
    if len({p.rotation.interleaved for p in found.pieces if p.rotation is not None}) > 1:
        return "queries or keys: rotations of several kinds"
    kept = 2 if found.pieces[0].across else 1
    if value.dim() - kept < 1 or (found.dim is not None and found.dim >= value.dim() - kept):
        return "queries or keys: joined along a dimension that is normed"
    wide = arithmetic(value.dtype)
    tables = {value.dtype, wide} if wide == value.dtype else {value.dtype, wide, torch.float64}
    for piece in found.pieces:
        for table in () if piece.rotation is None else (piece.rotation.cos, piece.rotation.sin):
            if table is None:
                continue
            given = value_of(table)
            if given.dtype.to_real() not in tables or given.device != value.device:
                return "queries or keys: the dtype or device of cos or sin"
            width = given.shape[-1] if given.dim() else 0
            if width not in (piece.shape[-1], piece.shape[-1] // 2):
                return "queries or keys: the shape of cos or sin"
    return None


def _pieces(node: fx.Node, norms: Mapping[fx.Node, tuple[fx.Node, Norm]]) -> tuple[list[Piece], int | None]:
    """The pieces that `node` joins, and along which dimension; `node` itself, if it is nothing else."""
    rotation = find_rotation(node)
    if rotation is not None:
        pieces, dim = _pieces(rotation.x, norms)
        if any(piece.rotation is not None for piece in pieces):
            pieces, dim = [_whole(rotation.x)], None
        return _rotated(pieces, dim, rotation), dim
    joined = _joined(node)
    if joined is not None:
        children, dim = joined
        found = [_child(child, view, dim, norms) for child, view in children]
        return [piece for pieces in found for piece in pieces], dim
    return [_normed(node, norms)], None


def _rotated(pieces: list[Piece], dim: int | None, rotation: Rotation) -> list[Piece]:
    if dim is None:
        return [replace(piece, rotation=rotation) for piece in pieces]
    found, start = [], 0
    for piece in pieces:
        end = start + piece.shape[dim]
        found.append(replace(piece, rotation=rotation, narrowed=(dim, start, end)))
        start = end
    return found


def _child(child: fx.Node, view: View | None, dim: int, norms: Mapping[fx.Node, tuple[fx.Node, Norm]]) -> list[Piece]:
    """The pieces of a view of one of the tensors that are joined along `dim`."""
    if view is None:
        pieces, joined = _pieces(child, norms)
        return pieces if joined in (None, dim) else [_whole(child)]
    piece = _normed(child, norms)
    start, end = view[1][1:]
    shape = torch.Size([end - start if axis == dim else size for axis, size in enumerate(piece.shape)])
    return [replace(piece, views=(*piece.views, view), shape=shape)]


def _normed(node: fx.Node, norms: Mapping[fx.Node, tuple[fx.Node, Norm]]) -> Piece:
    """`node` as a view of something normed, as far as that can be seen."""
    shape = value_of(node).shape
    if node in norms:
        source, norm = norms[node]
        return Piece(source, (), shape, norm)
    if node.target in RESHAPES:  # of heads that were normed together
        inner: Any = node.args[0]
        if inner in norms and value_of(inner).shape == (*shape[:-2], shape[-2:].numel()):
            source, norm = norms[inner]
            return Piece(source, ((aten.reshape.default, (list(shape),)),), shape, norm, across=True)
    if node.target is aten.slice.Tensor:
        given = arguments_of(node)
        dim = given["dim"] % len(shape)
        piece = _normed(given["self"], norms)
        if piece.norm is not None and dim < len(shape) - (2 if piece.across else 1):
            view = (aten.slice.Tensor, (dim, given["start"], given["end"], given["step"]))
            return replace(piece, views=(*piece.views, view), shape=shape)
    return _whole(node)


def _whole(node: fx.Node) -> Piece:
    return Piece(unwidened(node), (), value_of(node).shape)


def _joined(node: fx.Node) -> tuple[list[tuple[fx.Node, View | None]], int] | None:
    """The tensors that `node` joins, each with a slice to take of it, and the dimension; or None."""
    dims = value_of(node).dim()
    if node.target is aten.cat.default and dims > 1:
        tensors: Any = node.args[0]
        dim = arguments_of(node)["dim"] % dims
        if (
            isinstance(tensors, (list, tuple))
            and dim < dims - 1
            and all(value_of(each).dim() == dims for each in tensors)
        ):
            return [(each, None) for each in tensors], dim
    if node.target is aten.slice_scatter.default and dims > 1:
        given = arguments_of(node)
        dim, base, size = given["dim"] % dims, given["self"], value_of(node).shape[given["dim"] % dims]
        start, end, step = slice(given["start"], given["end"]).indices(size)
        if given["step"] != 1 or step != 1 or dim >= dims - 1 or start >= end:
            return None
        around = [(0, start), (end, size)]
        before, after = ([(base, (aten.slice.Tensor, (dim, a, b)))] if a < b else [] for a, b in around)
        return [*before, (written_value(given["src"]), None), *after], dim
    return None
