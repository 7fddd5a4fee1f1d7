"""How many kernels a step program launches on a GPU.

The rule: an operator is one launch if it makes memory of its own, and none if its result lies in the memory of an
argument (views, and `reshape`, `to` or `contiguous` where they have nothing to copy); a store is one launch, or none
where a linear layer writes into its slot.

So a linear layer counts once (one product, which adds the bias), attention once, a norm once. A convolution counts once
although cuDNN may add its bias in a second kernel; an operator that is written as several in eager PyTorch
(`rms_norm` before torch 2.8, say) counts once although it launches more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.graph.facts import value_of
from harmonica_rt.lower.plain import Program, with_stores


def launches(program: Program, *, direct: bool) -> Counter[str]:
    """Launches of a program by the names of their operators; `direct` as for `Program`."""
    found: Counter[str] = Counter()
    for node in program.step.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and makes_memory(node):
            found[node.target._schema.name.split("::")[1]] += 1
    copies = with_stores(program.step, direct=direct).find_nodes(op="call_method", target="copy_")
    return found + Counter(store=len(copies))


def makes_memory(node: fx.Node) -> bool:
    """Whether a node's result lies in memory of its own."""
    arguments = _storages(map(value_of, node.all_input_nodes))
    return not arguments or arguments.isdisjoint(_storages([_result(node)]))


def _result(node: fx.Node) -> Any:
    args, kwargs = pytree.tree_map_only(fx.Node, value_of, (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _storages(values: Any) -> set[int]:
    leaves: Sequence[Any] = pytree.tree_leaves(list(values))
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}
