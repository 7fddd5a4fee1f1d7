"""Weighted sums as operands of fused operators.

The operators add `gate * sum_j w_j * value_j` in one pass. So where only residuals read a weighted sum, it need not
reach memory. A sum that has other readers is computed once, by `forecast`.

Requires: a step graph whose nodes carry fake tensors, and views that are still views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import is_item, is_view, value_of
from harmonica_rt.graph.weighted_sum import weighted_sum
from harmonica_rt.lower.casts import DTYPES
from harmonica_rt.lower.residual_pattern import Residual
from harmonica_rt.lower.rewriting import Rewriting, result_of


@dataclass(frozen=True)
class Term:
    """`gate * sum_j weights[places[j]] * caches[j]`, or `gate * caches[0]` without weights; None as a gate is 1."""

    gate: fx.Node | None
    caches: tuple[fx.Node, ...]
    weights: fx.Node | None = None
    places: tuple[int, ...] = (-1,)


def weighted_sums(graph: fx.Graph) -> list[fx.Node]:
    """The weighted sums of a step graph."""
    return graph.find_nodes(op="call_function", target=weighted_sum)


def sums_to_expand(residuals: Iterable[Residual]) -> frozenset[fx.Node]:
    """The weighted sums that only these residuals read, and that cost less memory traffic as terms of them.

    Of n values, r residuals read n * r tensors of their size; a sum of its own reads n and writes one, and r are read.
    """
    readers: dict[fx.Node, list[Residual]] = {}
    for residual in residuals:
        total = sum_below(residual.y)
        if total is not None:
            readers.setdefault(total, []).append(residual)
    return frozenset(total for total, found in readers.items() if _is_cheaper(total, found))


def sum_below(node: fx.Node) -> fx.Node | None:
    """The weighted sum that a node is, or is a view of; None if it is neither."""
    while is_item(node) or (is_view(node) and _is_free(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is weighted_sum else None


def term_of(residual: Residual, expanded: frozenset[fx.Node], rewriting: Rewriting, before: fx.Node) -> Term:
    """The term that a residual adds: of the values of a weighted sum if that is `expanded`, else of what it adds.

    Where a view of the sum is added, the same views of its values are inserted before the node `before`.
    """
    total = sum_below(residual.y)
    if total is None or total not in expanded:
        return Term(residual.gate, (residual.y,))
    views: list[fx.Node] = []
    node = residual.y
    while node is not total:
        views.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    caches, weights, places = _operands(total)
    for view in views:
        caches = tuple(rewriting.insert(before, view.target, (c, *view.args[1:]), view.kwargs) for c in caches)
    return Term(residual.gate, caches, weights, places)


def lower_sums(rewriting: Rewriting) -> int:
    """Replace the weighted sums that are left in a graph by calls of `forecast`, where it takes them; return how many.

    Another result than the sum's in dtype or strides is never made.
    """
    replaced = 0
    for total in weighted_sums(rewriting.graph):
        caches, weights, places = _operands(total)
        value = value_of(total)
        if value.dtype not in DTYPES or torch.empty_like(value_of(caches[0])).stride() != value.stride():
            continue
        arguments = (list(caches), weights, list(places))
        rewriting.replace(total, rewriting.insert(total, torch.ops.harmonica.forecast.default, arguments))
        replaced += 1
    return replaced


def _operands(total: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node, tuple[int, ...]]:
    """The values of a weighted sum, the weights, and the index of each value's weight in them, flattened."""
    values: Any
    weights: Any
    row: Any
    values, weights, row = total.args
    first = row * value_of(weights).shape[-1]
    return tuple(values), weights, tuple(range(first, first + len(values)))


def _is_cheaper(total: fx.Node, residuals: list[Residual]) -> bool:
    """Whether all readers of a sum are these residuals, and its values as their terms cost no more than the sum."""
    if any(sum_below(node) is total for each in residuals for node in (each.x, each.gate) if node is not None):
        return False
    if set(_readers(total)) != {_taker(each) for each in residuals}:
        return False
    size, count = value_of(total).numel(), len(total.args[0])  # type: ignore[arg-type]
    read = sum(min(1.0, value_of(each.y).numel() / size) for each in residuals) if size else 0.0
    return count * read <= count + 1 + read


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a value, itself or through views."""
    for user in node.users:
        if is_item(user) or (is_view(user) and _is_free(user)):
            yield from _readers(user)
        else:
            yield user


def _taker(residual: Residual) -> fx.Node:
    """The node of a residual that takes its `y`: the addition, or the product with the gate."""
    if residual.gate is None:
        return residual.node
    operands = {residual.y, residual.gate}
    return next(node for node in residual.node.all_input_nodes if operands <= {*node.all_input_nodes})


def _is_free(view: fx.Node) -> bool:
    """Whether a view makes no copy, as `reshape`, `to` and the like may."""
    results = result_of(view)
    source = value_of(view.args[0])  # type: ignore[arg-type]
    first = results[0] if isinstance(results, (list, tuple)) else results
    return bool(first.untyped_storage()._cdata == source.untyped_storage()._cdata)
