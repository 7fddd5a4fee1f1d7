"""Specialise the captured graph for one pattern of (reuse, store).

Requires: a functional captured graph. Ensures: every reused site is a slot read, nothing that fed only reused sites is
left, every stored value is an extra output, and no node is shared with the captured graph (weights are shared: both
graphs refer to them only by name).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from harmonica_rt.capture.capture import CapturedGraph
from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.functionalise import is_mutating
from harmonica_rt.indices import SiteIndex, SiteOutput


@dataclass(frozen=True)
class Pattern:
    """Which sites a step reuses, and which outputs of those it computes are stored for a later step."""

    reuse: frozenset[SiteIndex]
    store: frozenset[SiteOutput]


@dataclass(frozen=True)
class StepGraph:
    """The captured graph specialised for one pattern.

    Placeholders come in the order weights, constants, inputs, hoisted, reads; the field of each of these names has one
    entry per placeholder. The output node holds `(outputs, stored)`, two flat tuples.
    """

    graph: fx.Graph
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    inputs: tuple[int, ...]
    reads: tuple[SiteOutput, ...]
    stores: tuple[SiteOutput, ...]
    hoisted: tuple[str, ...] = ()

    @property
    def read_nodes(self) -> list[fx.Node]:
        """The placeholders that stand for slots."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        return placeholders[len(placeholders) - len(self.reads) :]

    @property
    def stored_nodes(self) -> list[fx.Node]:
        """The values to store, one for each of `stores`."""
        return list(self.graph.output_node().args[0][1])  # type: ignore[index,arg-type]


def specialise(captured: CapturedGraph, pattern: Pattern) -> StepGraph:
    """Build the step graph of `pattern`.

    Raises:
        InvariantError: a site is both reused and stored.
    """
    both = pattern.reuse & {output.site for output in pattern.store}
    if both:
        raise InvariantError(f"sites {sorted(both)} are reused and stored in one step")
    reads = _reused_nodes(captured, pattern)
    stores = {output: captured.outputs_of(output.site)[output.output] for output in sorted(pattern.store)}
    results = list(captured.output.args[0])  # type: ignore[arg-type]
    needed = needed_nodes([*results, *stores.values()], set(reads.values()))

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder" and node in needed]
    weights = [node for node in placeholders if node.name in captured.weights]
    constants = [node for node in placeholders if node.name in captured.constants]
    inputs = [node for node in placeholders if node.name in captured.inputs]
    for node in (*weights, *constants, *inputs):
        copies[node] = _placeholder(graph, node.name, node)
    live_reads = {output: node for output, node in reads.items() if node in needed}
    for output, node in live_reads.items():
        copies[node] = _placeholder(graph, f"slot_{_identifier(captured.sites[output.site])}_{output.output}", node)
    for node in captured.graph.nodes:
        if node in needed and node.op in ("call_function", "get_attr") and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta["captured_name"] = node.name
    graph.output(
        (
            tuple(_value(result, copies) for result in results),
            tuple(copies[node] for node in stores.values()),
        )
    )
    step = StepGraph(
        graph=graph,
        weights=tuple(captured.weights[node.name] for node in weights),
        constants=tuple(node.name for node in constants),
        inputs=tuple(captured.inputs[node.name] for node in inputs),
        reads=tuple(live_reads),
        stores=tuple(stores),
    )
    check_step_graph(step)
    return step


def live_reads(captured: CapturedGraph, pattern: Pattern) -> list[SiteOutput]:
    """The outputs of reused sites that a step of this pattern actually reads."""
    reads = _reused_nodes(captured, pattern)
    stored = [captured.outputs_of(output.site)[output.output] for output in pattern.store]
    needed = needed_nodes([*captured.output.args[0], *stored], set(reads.values()))  # type: ignore[misc]
    return [output for output, node in reads.items() if node in needed]


def check_step_graph(step: StepGraph) -> None:
    """Check the invariants of a step graph.

    Raises:
        InvariantError: a mutating operator, a node without users, or a wrong number of placeholders.
    """
    step.graph.lint()
    placeholders = 0
    for node in step.graph.nodes:
        if is_mutating(node):
            raise InvariantError(f"step graph holds the mutating operator {node.target}")
        if node.op not in ("placeholder", "output") and not node.users:
            raise InvariantError(f"step graph holds {node.name}, which feeds nothing")
        placeholders += node.op == "placeholder"
    expected = len(step.weights) + len(step.constants) + len(step.inputs) + len(step.hoisted) + len(step.reads)
    if placeholders != expected:
        raise InvariantError(f"step graph has {placeholders} placeholders, its tables name {expected}")


def _reused_nodes(captured: CapturedGraph, pattern: Pattern) -> dict[SiteOutput, fx.Node]:
    return {
        SiteOutput(site, index): node
        for site in sorted(pattern.reuse)
        for index, node in enumerate(captured.outputs_of(site))
    }


def needed_nodes(roots: Iterable[Any], cut: set[fx.Node]) -> set[fx.Node]:
    """The roots and all nodes that they depend on; the search does not go past `cut` nodes."""
    needed: set[fx.Node] = set()
    pending = [root for root in roots if isinstance(root, fx.Node)]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in cut:
            pending.extend(node.all_input_nodes)
    return needed


def _placeholder(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = like.meta["val"]
    return node


def _value(result: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    return copies[result] if isinstance(result, fx.Node) else result


def _identifier(path: str) -> str:
    return re.sub(r"\W", "_", path)
