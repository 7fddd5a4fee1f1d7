"""Changes to a graph that fusing is made of: insert a call, put it in the place of another node, move operands forward.

Hazard: what replaces a node may have other strides, which a later `view` may rely on. `Rewriting` records such nodes,
and `restride` recomputes what depends on them once all rewriting is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.facts import value_of

aten = torch.ops.aten


class Rewriting:
    """A graph being rewritten in place.

    Attributes:
        graph: the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._restrided: set[fx.Node] = set()

    def insert(
        self, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Add a call before a node, with the result on fake tensors as its value."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = before.meta.get("nn_module_stack")
        node.meta["val"] = result_of(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` be used for `old`, which is erased with all that only it used."""
        if value_of(old).stride() != value_of(new).stride():
            self._restrided.add(new)
        new.meta = {**old.meta, "val": value_of(new)}
        old.replace_all_uses_with(new)
        erase(old)

    def restride(self) -> None:
        """Recompute the fake tensors of all nodes downstream of replaced ones whose strides have changed.

        `view` raises where strides do not allow it, so it becomes `reshape`.

        Raises:
            InvariantError: a node reads memory by strides that changed.
        """
        restrided = self._restrided
        for node in self.graph.nodes if restrided else ():
            if node.op != "call_function" or restrided.isdisjoint(node.all_input_nodes):
                continue
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
            if node.target is aten.as_strided.default:
                raise InvariantError(f"{node.name} reads memory by strides that fusing changed; use lowering='plain'")
            fresh = result_of(node)
            if _strides(fresh) != _strides(value_of(node)):
                restrided.add(node)
            node.meta["val"] = fresh


def erase(node: fx.Node) -> None:
    """Erase a node that nothing uses, and the nodes that only it used."""
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead.users or dead.op not in ("call_function", "get_attr") or dead._erased:
            continue
        pending.extend(dead.all_input_nodes)
        dead.graph.erase_node(dead)


def move_before(target: fx.Node, operands: Iterable[fx.Node]) -> bool:
    """Move operands and what they need before `target`; if one needs `target` itself, move nothing and return False."""
    needed: set[fx.Node] = set()
    pending = list(operands)
    while pending:
        node = pending.pop()
        if node is target:
            return False
        if node not in needed and node > target:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in sorted(needed):
        target.prepend(node)
    return True


def _strides(values: Any) -> list[Any]:
    return [leaf.stride() for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def result_of(node: fx.Node) -> Any:
    """The result of a node on the fake tensors of its arguments."""
    args, kwargs = pytree.tree_map_only(fx.Node, value_of, (node.args, node.kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
