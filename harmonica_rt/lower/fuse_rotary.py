"""Fuse what is done to queries and keys between their projections and the attention into calls of `norm_rotary`.

Requires: a step graph whose nodes carry fake tensors, not yet cut from its prologue.
Ensures: the same values up to rounding; one call for the queries and keys of an attention where their norms and
rotations agree; what does not depend on the latents stays in the prologue.

Hazard: keys of a cross-attention are computed once per run. Computed together with the queries, they would be computed
in every step. So a call takes only queries and keys that depend on the latents.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import arguments_of, is_item, is_view, needed_nodes, value_of
from harmonica_rt.lower.casts import is_cast
from harmonica_rt.lower.norm_pattern import Norm
from harmonica_rt.lower.qk_pattern import Piece, Prepared, find_prepared, norms_by_result
from harmonica_rt.lower.rewriting import Rewriting, move_before
from harmonica_rt.lower.rotary_pattern import Rotation, find_rotation

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
COPIES = (aten.clone.default, aten.contiguous.default, aten.repeat.default, aten.repeat_interleave.self_int)


def fuse_rotary(rewriting: Rewriting, moves: Callable[[fx.Node], bool]) -> tuple[int, Counter[str]]:
    """Rewrite all queries and keys of a graph.

    Args:
        rewriting: the graph.
        moves: whether a node depends on the latents.

    Returns:
        The number of calls, and why queries and keys were left, with counts.
    """
    fusion = _Fusion(rewriting)
    reasons: Counter[str] = Counter()
    norms = norms_by_result(rewriting.graph)
    seen: set[fx.Node] = set()

    def found(roots: list[fx.Node]) -> Iterator[Prepared]:
        for root in roots:
            if root in seen or not moves(root):
                continue
            seen.add(root)
            match = find_prepared(root, norms)
            if isinstance(match, Prepared) and not _is_closed(match):
                match = "queries or keys: something between is used elsewhere"
            if isinstance(match, str):
                reasons[match] += 1
            elif match is not None:
                yield match

    for attention in rewriting.graph.find_nodes(op="call_function", target=ATTENTION):
        given = arguments_of(attention)
        fusion.visit(list(found([_root(given["query"], norms), _root(given["key"], norms)])))
    for node in list(rewriting.graph.nodes):
        if node.users and not node._erased and node not in seen and find_rotation(node) is not None:
            fusion.visit(list(found([node])))
    return fusion.calls, reasons


class _Fusion:
    """Rewrites matches in place; views of tables are inserted once for all calls."""

    def __init__(self, rewriting: Rewriting) -> None:
        self.calls = 0
        self._rewriting = rewriting
        self._views: dict[Any, fx.Node] = {}

    def visit(self, matches: list[Prepared]) -> None:
        """Rewrite queries and keys, by one call if they agree; a match that is one launch already stays."""
        if len(matches) == 2 and _agree(*matches):
            first, second = sorted(matches, key=lambda match: match.out)
            if _launches(*matches) > 1 and move_before(first.out, (o for p in second.pieces for o in p.operands)):
                self._rewrite([first, second])
                return
        for match in matches:
            if _launches(match) > 1:
                self._rewrite([match])

    def _rewrite(self, matches: list[Prepared]) -> None:
        before = matches[0].out
        pieces = [piece for match in matches for piece in match.pieces]
        first = pieces[0]
        kinds = {piece.rotation.interleaved for piece in pieces if piece.rotation is not None}
        dims = [match.dim for match in matches if match.dim is not None]
        kept = 2 if first.across else 1
        parts = [self._part(before, piece) for piece in pieces]
        tables = [self._tables(before, piece) for piece in pieces]
        call = self._rewriting.insert(
            before,
            torch.ops.harmonica.norm_rotary.default,
            (
                parts,
                [len(match.pieces) for match in matches],
                [piece.norm and piece.norm.weight for piece in pieces],
                [piece.norm and piece.norm.bias for piece in pieces],
                [cos for cos, _ in tables],
                [sin for _, sin in tables],
            ),
            {
                "dim": dims[0] if dims else min(1, value_of(matches[0].out).dim() - kept - 1),
                "norm": "none" if first.norm is None else "rms" if first.norm.rms else "layer",
                "across": first.across,
                "eps": 0.0 if first.norm is None else first.norm.eps,
                "interleaved": kinds != {False},
            },
        )
        self.calls += 1
        results = [self._rewriting.insert(before, operator.getitem, (call, index)) for index in range(len(matches))]
        for match, result in zip(matches, results, strict=True):
            self._rewriting.replace(match.out, result)

    def _part(self, before: fx.Node, piece: Piece) -> fx.Node:
        node = piece.source
        for target, args in piece.views:
            node = self._rewriting.insert(before, target, (node, *args))
        return node

    def _tables(self, before: fx.Node, piece: Piece) -> tuple[fx.Node | None, fx.Node | None]:
        """The cos and sin of a piece."""
        if piece.rotation is None:
            return None, None
        rotation: Rotation = piece.rotation
        cos, sin = self._shared(before, rotation.cos), rotation.sin
        if sin is None:
            pairs = self._view(before, aten.view_as_real.default, cos)
            cos, sin = (self._view(before, aten.select.int, pairs, -1, part) for part in (0, 1))
        else:
            sin = self._shared(before, sin)
        return self._narrowed(before, cos, piece), self._narrowed(before, sin, piece)

    def _narrowed(self, before: fx.Node, table: fx.Node, piece: Piece) -> fx.Node:
        if piece.narrowed is None:
            return table
        dim, start, end = piece.narrowed
        axis = dim - len(piece.shape) + value_of(table).dim()
        if axis < 0 or value_of(table).shape[axis] == 1:
            return table
        return self._view(before, aten.slice.Tensor, table, axis, start, end)

    def _view(self, before: fx.Node, target: Any, node: fx.Node, *args: Any) -> fx.Node:
        key = (target, node, args)
        if key not in self._views or self._views[key]._erased:
            self._views[key] = self._rewriting.insert(before, target, (node, *args))
        move_before(before, [self._views[key]])  # it may have been made for a call that comes later
        return self._views[key]

    def _shared(self, before: fx.Node, node: fx.Node) -> fx.Node:
        """The first node that is the same view of the same tensor: models make views of one table in every block."""
        source = node.args[0] if is_view(node) and not is_item(node) and len(node.all_input_nodes) == 1 else None
        if not isinstance(source, fx.Node) or node.kwargs:
            return node
        key = (node.target, self._shared(before, source), repr(node.args[1:]))
        if key not in self._views or self._views[key]._erased:
            self._views[key] = node
        move_before(before, [self._views[key]])
        return self._views[key]


def _root(node: Any, norms: Mapping[fx.Node, tuple[fx.Node, Norm]]) -> fx.Node:
    """What becomes queries or keys by views and copies alone."""
    while find_prepared(node, norms) is None:
        inputs = node.all_input_nodes
        if len(inputs) != 1 or not (is_view(node) or is_item(node) or node.target in COPIES) or is_cast(node):
            break
        node = inputs[0]
    root: fx.Node = node
    return root


def _agree(one: Prepared, other: Prepared) -> bool:
    """Whether one call can compute both."""
    *own, kinds = one.settings
    *theirs, others = other.settings
    dims = {match.dim for match in (one, other)} - {None}
    return own == theirs and len(kinds | others) <= 1 and len(dims) <= 1


def _inner(match: Prepared) -> set[fx.Node]:
    """The nodes that a match stands for, `out` included."""
    operands = {operand for piece in match.pieces for operand in piece.operands}
    return needed_nodes([match.out], operands) - operands


def _is_closed(match: Prepared) -> bool:
    """Whether nothing outside uses what lies between the operands and the result."""
    inner = _inner(match)
    return all(user in inner for node in inner - {match.out} for user in node.users)


def _launches(*matches: Prepared) -> int:
    """Number of operators, views aside, that matches stand for."""
    inner = set[fx.Node]().union(*map(_inner, matches))
    return sum(
        node.op == "call_function" and not is_item(node) and (is_cast(node) or not is_view(node)) for node in inner
    )
