"""Counts the floating-point operations of graphs with torch's own FlopCounterMode.

Each node of the captured graph is counted once, with fake tensors; a step graph then sums the counts of the nodes that
it kept. On CPU, attention runs as an operator that FlopCounterMode does not know (34 % of a PixArt-1024 block), so the
counter is given the formula of the attention operator that it does know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count


def _cpu_attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


class _NoModules:
    """Stands in for the counter's module tracker, whose hooks would run on every module in every thread."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """A FlopCounterMode that also counts attention on CPU, in total and not per module."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(CPU_ATTENTION))
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def count_nodes(graph: fx.Graph) -> dict[str, int]:
    """The FLOPs of each node, by name; nodes that do none are left out. Empty if the nodes carry no fake tensors.

    A multiply-add counts as two. Element-wise operators count as zero, as is usual in the field.
    """
    mode = _fake_mode(graph)
    counts: dict[str, int] = {}
    if mode is None:
        return counts
    for node in graph.nodes:
        if node.op != "call_function" or not _may_count(node.target):
            continue
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        counter = flop_counter()
        with mode, torch.no_grad(), counter:
            node.target(*args, **kwargs)
        total = counter.get_total_flops()
        if total:
            counts[node.name] = int(total)
    return counts


def total(graph: fx.Graph, counts: dict[str, int]) -> int:
    """The FLOPs of a step graph, given the counts of the captured graph that it was specialised from."""
    return sum(counts.get(name, 0) for name in _names(graph))


def _names(graph: fx.Graph) -> Iterable[str]:
    return (str(node.meta.get("captured_name", node.name)) for node in graph.nodes if node.op == "call_function")


def _may_count(target: Any) -> bool:
    """Whether FlopCounterMode counts an operator, or may count those it decomposes into (linear, einsum, attention)."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._overloadpacket in flop_registry or target._overloadpacket in CPU_ATTENTION:
        return True
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(target.has_kernel_for_dispatch_key(composite))


def _fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode  # type: ignore[no-any-return]
    return None
