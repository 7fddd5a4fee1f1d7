"""Rotary embeddings: what they look like in a graph.

Models write the rotation of pairs in four ways: as `x * cos + turned(x) * sin`, where `turned` makes (-b, a) of a pair
(a, b); as both numbers of the pairs computed apart, then put together by `stack` or `cat`, or by writing every second
column; and as a product of complex numbers.

Hazard: fusing what only looks like a match changes values. So what is taken apart and put together is followed element
for element, by the shapes and dimensions of every view on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import value_of
from harmonica_rt.graph.match import Op, Operand, matches
from harmonica_rt.lower.casts import is_cast, unwidened
from harmonica_rt.lower.halves import RESHAPES, Half, half_of, joined_halves, splits, written_halves

aten = torch.ops.aten


def _product(one: str, other: str) -> Op:
    return Op((aten.mul.Tensor,), (Operand(one), Operand(other)), commutes=True)


ROTATED = Op((aten.add.Tensor,), (_product("x", "cos"), _product("turned", "sin")), commutes=True)
ROTATED_FIRST = Op((aten.sub.Tensor,), (_product("first", "cos"), _product("second", "sin")))
ROTATED_SECOND = Op((aten.add.Tensor,), (_product("second", "cos"), _product("first", "sin")), commutes=True)
COMPLEX_PRODUCT = _product("pairs", "table")


@dataclass(frozen=True)
class Rotation:
    """`out = rotate(x)`: cos and sin are nodes; or `cos` is complex, with the sines as its imaginary part.

    `interleaved` says whether the numbers of a pair are neighbours.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node | None
    interleaved: bool


def find_rotation(node: fx.Node) -> Rotation | None:
    """Match `node` as `rotate(x)` in the dtype of `x`, a cast back to it included."""
    inner = node.args[0] if is_cast(node) else node
    if not isinstance(inner, fx.Node):
        return None
    found = _turned_and_added(inner) or _put_together(inner) or _complex(inner)
    if found is None:
        return None
    a, b = value_of(found.x), value_of(node)
    return found if (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) else None


def _turned_and_added(node: fx.Node) -> Rotation | None:
    for bound in matches(ROTATED, node):
        x, turned = unwidened(bound["x"]), _turned(unwidened(bound["turned"]))
        if turned is not None and unwidened(turned.x) is x:
            return Rotation(x, bound["cos"], bound["sin"], turned.interleaved)
    return None


def _turned(node: fx.Node) -> Half | None:
    """The first half of `x`, if `node` holds, for each pair (a, b) of `x`, (-b, a)."""
    halves = joined_halves(node)
    if halves is None:
        return None
    (one, interleaved), (other, _) = halves
    first, second = half_of(other), half_of(one)
    if first is None or second is None or not second.negative or first.negative:
        return None
    expected = replace(first, second=True, negative=True)
    return first if not first.second and second == expected and first.interleaved is interleaved else None


def _put_together(node: fx.Node) -> Rotation | None:
    """Match `node` as the two numbers of all pairs, each computed from both."""
    halves = joined_halves(node) or written_halves(node)
    if halves is None:
        return None
    (one, interleaved), (other, _) = halves
    one, other = (each.args[0] if is_cast(each) else each for each in (one, other))  # type: ignore[assignment]
    for a in matches(ROTATED_FIRST, one):
        for b in matches(ROTATED_SECOND, other):
            if any(a[name] is not b[name] for name in ("cos", "sin")):
                continue
            first, second = half_of(a["first"]), half_of(a["second"])
            if first is None or (first.second, first.interleaved, first.negative) != (False, interleaved, False):
                continue
            if second == replace(first, second=True) and (half_of(b["first"]), half_of(b["second"])) == (first, second):
                return Rotation(unwidened(first.x), a["cos"], a["sin"], interleaved)
    return None


def _complex(node: fx.Node) -> Rotation | None:
    """Match `node` as a product of complex numbers, taken from and written to neighbours."""
    product = _reshaped(node, aten.view_as_real.default)
    for bound in matches(COMPLEX_PRODUCT, product) if product is not None else ():
        pairs, table = bound["pairs"], bound["table"]
        if pairs.target is not aten.view_as_complex.default or not _has_parts(value_of(table)):
            continue
        source = pairs.args[0]
        if source.target in RESHAPES:
            x = unwidened(source.args[0])
            if value_of(x).shape == value_of(node).shape and splits(source, value_of(x).shape, interleaved=True):
                return Rotation(x, table, None, True)
    return None


def _has_parts(table: torch.Tensor) -> bool:
    """Whether the real and imaginary parts of a table lie in memory."""
    return table.is_complex() and not table.is_conj()


def _reshaped(node: fx.Node, target: Any) -> fx.Node | None:
    """The argument of the `target` call that `node` reshapes to the last dimensions' product."""
    source = node.args[0] if node.target in RESHAPES else None
    if not isinstance(source, fx.Node) or source.target is not target:
        return None
    return source.args[0] if splits(source, value_of(node).shape, interleaved=True) else None  # type: ignore[return-value]
