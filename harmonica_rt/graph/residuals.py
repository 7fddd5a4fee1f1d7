"""Residuals of spans in a graph: what leaves a span less what it grew from, and the sum of the two again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import value_of
from harmonica_rt.graph.layout import laid_out
from harmonica_rt.graph.rebuild import Rebuild

aten = torch.ops.aten


def residual_of(rebuilt: Rebuild, node: fx.Node, base: fx.Node | None) -> fx.Node:
    """The value to cache for an output in the new graph: it less its base; itself if it has none."""
    if base is None:
        return rebuilt[node]
    return _call(rebuilt, aten.sub.Tensor, rebuilt[node], rebuilt[base])


def with_residual(rebuilt: Rebuild, node: fx.Node, base: fx.Node | None, cached: fx.Node) -> fx.Node:
    """What stands for a reused output in the new graph: its base plus the cached residual; the cached value if none.

    The sum has the dtype and the strides of `node`. Strides of dimensions of size 1 may differ, as they do no harm.
    """
    if base is None:
        return cached
    wanted = value_of(node)
    total = _call(rebuilt, aten.add.Tensor, rebuilt[base], cached)
    if value_of(total).dtype != wanted.dtype:
        total = _call(rebuilt, aten._to_copy.default, total, dtype=wanted.dtype)
    if _strides(value_of(total)) != _strides(wanted):
        total = rebuilt.graph.call_function(laid_out, (total, wanted.stride()))
    total.meta["val"] = wanted
    return total


def _call(rebuilt: Rebuild, target: Any, *args: fx.Node, **kwargs: Any) -> fx.Node:
    node = rebuilt.graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*map(value_of, args), **kwargs)
    return node


def _strides(tensor: torch.Tensor) -> list[int]:
    """The strides of dimensions that have more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
