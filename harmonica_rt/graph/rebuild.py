"""Builds a new graph out of copies of another graph's nodes."""

from __future__ import annotations

from typing import Any

from torch import fx


class Rebuild:
    """A new graph, and a table of which of its nodes stand for which nodes of the old graph.

    Nodes are added in the order in which they will run. The old graph stays as it is.

    Attributes:
        graph: the new graph; it has no output before `finish`.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}

    def __contains__(self, old: fx.Node) -> bool:
        return old in self._new

    def __getitem__(self, old: fx.Node) -> fx.Node:
        """The node that stands for `old`."""
        return self._new[old]

    def __setitem__(self, old: fx.Node, new: fx.Node) -> None:
        """Let a node of the new graph stand for `old`."""
        self._new[old] = new

    def __len__(self) -> int:
        """The number of old nodes that a new node stands for."""
        return len(self._new)

    def placeholder(self, old: fx.Node, name: str | None = None) -> fx.Node:
        """Add and return a placeholder for the value of `old`, called `name` if given, otherwise as `old` is."""
        self._new[old] = self.graph.placeholder(name or old.name)
        if "val" in old.meta:
            self._new[old].meta["val"] = old.meta["val"]
        return self._new[old]

    def copy(self, old: fx.Node) -> fx.Node:
        """Add and return a copy of a node whose inputs are already in the new graph."""
        self._new[old] = self.graph.node_copy(old, self._new.__getitem__)
        return self._new[old]

    def copy_with_inputs(self, old: fx.Node) -> fx.Node:
        """The copy of a node; if there is none yet, it is added, after those of its inputs that are missing too."""
        if old not in self._new:
            self._new[old] = self.graph.node_copy(old, self.copy_with_inputs)
        return self._new[old]

    def new(self, values: Any) -> Any:
        """A nested tuple, list or dict with each old node replaced by the new one that stands for it."""
        return fx.map_arg(values, self._new.__getitem__)

    def finish(self, results: Any) -> fx.Graph:
        """End the graph with an output of these nodes of the new graph, check it and return it."""
        self.graph.output(results)
        self.graph.lint()
        return self.graph


def copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, whose nodes can be changed without touching the original."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
