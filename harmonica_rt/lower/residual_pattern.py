"""Finds residual additions in a graph.

`x + gate * y` also occurs where there is no residual (rotary embeddings are sums of two products). A residual is
recognised by where `y` comes from: a slot, an input, or another module than the one that adds.

Hazard: fusing what only looks like a match changes values. So every operand is checked for the shapes and dtypes that
the fused operators take.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import fx

from harmonica_rt.graph.facts import is_item, is_view, value_of
from harmonica_rt.graph.match import Op, Operand, matches
from harmonica_rt.lower.casts import DTYPES

aten = torch.ops.aten

SUM = Op((aten.add.Tensor,), (Operand("x"), Operand("added")), commutes=True)
PRODUCT = Op((aten.mul.Tensor,), (Operand("y"), Operand("gate")), commutes=True)


@dataclass(frozen=True)
class Residual:
    """`node = x + gate * y`, or `x + y` without a gate; `x` and `y` have the shape of `node`."""

    node: fx.Node
    x: fx.Node
    y: fx.Node
    gate: fx.Node | None


def find_residual(node: fx.Node, slots: Set[fx.Node]) -> Residual | str | None:
    """Match `node` as a residual addition.

    Returns:
        The residual; the reason if it is one that the operators do not take; None if it is not a residual.
    """
    sums = list(matches(SUM, node))
    if not sums:
        return None
    shape = value_of(node).shape
    found: list[Residual] = []
    reasons: set[str] = set()
    for x, added in ((bound["x"], bound["added"]) for bound in sums):
        for y, gate in _candidates(added, x):
            if value_of(x).shape != shape or not _comes_from_elsewhere(y, node, slots):
                continue
            tensors = [value_of(each) for each in (node, x, y, gate) if each is not None]
            if value_of(y).shape != shape or (gate is not None and not _broadcasts(value_of(gate).shape, shape)):
                if y in slots:
                    reasons.add("residual: the shape of the slot is not that of the sum")
            elif len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1 or tensors[0].dtype not in DTYPES:
                if y in slots or gate is not None:
                    reasons.add("residual: dtypes or devices differ")
            elif shape:
                found.append(Residual(node, x, y, gate))
    if found:
        # Of several candidates: a gate saves a pass, a slot is never the running sum `x`, a sum is likely to be it.
        return max(found, key=lambda r: (r.gate is not None, r.y in slots, r.x.target is aten.add.Tensor))
    return min(reasons, default=None)


def _candidates(added: fx.Node, x: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """Each possible `(y, gate)` of what is added to `x`: a product used nowhere else, both ways round; and no gate."""
    if not _is_own_product(x) and len(added.users) == 1:
        for bound in matches(PRODUCT, added):
            yield bound["y"], bound["gate"]
    yield added, None


def _is_own_product(node: fx.Node) -> bool:
    return len(node.users) == 1 and any(True for _ in matches(PRODUCT, node))


def _comes_from_elsewhere(y: fx.Node, addition: fx.Node, slots: Set[fx.Node]) -> bool:
    """Whether `y`, possibly through views, is a slot, an input, or from another module than the one that adds it."""
    while y not in slots and (is_view(y) or is_item(y)):
        y = y.all_input_nodes[0]
    return y in slots or _module(y) is None or _module(y) != _module(addition)


def _module(node: fx.Node) -> str | None:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else None


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    return all(n in (1, wanted) for n, wanted in zip(reversed(shape), reversed(target), strict=False))
