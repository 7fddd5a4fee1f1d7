"""Merges equal values of the prologue: models embed the same timestep in every block.

Two nodes are equal if they apply one operator to equal arguments; torch has the same pass for graphs that it compiles,
but it takes 1 and 1.0 for equal, which give results of different dtypes.

Requires: a functional graph. Ensures: the same values bit for bit; results may share memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.graph.rebuild import Rebuild


def merged(graph: fx.Graph, nodes: Collection[fx.Node]) -> Rebuild:
    """A copy of `graph` in which equal ones of `nodes`, which are pure functions of their arguments, are one node.

    Args:
        graph: the graph; it has no output in the copy.
        nodes: the nodes that may be merged.
    """
    rebuilt = Rebuild()
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        key = _key(node, rebuilt) if node in nodes and node.op == "call_function" else None
        if key is None or key not in known:
            copied = rebuilt.copy(node)
            if key is not None:
                known[key] = copied
        else:
            rebuilt[node] = known[key]
    return rebuilt


def _key(node: fx.Node, rebuilt: Rebuild) -> Any:
    """What equal nodes have in common; None for a node whose arguments cannot be compared."""
    leaves, spec = pytree.tree_flatten(rebuilt.new((node.args, dict(node.kwargs))))
    key = (node.target, str(spec), tuple((type(leaf), _told_apart(leaf)) for leaf in leaves))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _told_apart(leaf: Any) -> Any:
    """What is equal for equal arguments only: 0.0 and -0.0 are equal in Python."""
    return repr(leaf) if isinstance(leaf, float | complex) else leaf
