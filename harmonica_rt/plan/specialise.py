"""Specialises the captured graph for one pattern: which sites are reused, which outputs are stored.

Requires: a functional captured graph. Ensures: every reused site is a slot read, nothing that fed only reused sites is
left, every stored value is an extra output, and no node is shared with the captured graph (parameters are shared: both
graphs refer to them only by name).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.facts import needed_nodes
from harmonica_rt.graph.rebuild import Rebuild
from harmonica_rt.indices import SiteIndex, SiteOutput
from harmonica_rt.plan.step_graph import StepGraph, check_step_graph


@dataclass(frozen=True)
class Pattern:
    """Which sites a step reuses, and which outputs of those it computes are stored for a later step."""

    reuse: frozenset[SiteIndex]
    store: frozenset[SiteOutput]


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

    rebuilt = Rebuild()
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder" and node in needed]
    parameters = [node for node in placeholders if node.name in captured.parameters]
    constants = [node for node in placeholders if node.name in captured.constants]
    inputs = [node for node in placeholders if node.name in captured.inputs]
    for node in (*parameters, *constants, *inputs):
        rebuilt.placeholder(node)
    live = {output: node for output, node in reads.items() if node in needed}
    for output, node in live.items():
        rebuilt.placeholder(node, f"slot_{_identifier(captured.sites[output.site])}_{output.output}")
    for node in captured.graph.nodes:
        if node in needed and node.op in ("call_function", "get_attr") and node not in rebuilt:
            rebuilt.copy(node).meta["captured_name"] = node.name
    step = StepGraph(
        graph=rebuilt.finish(rebuilt.new((tuple(results), tuple(stores.values())))),
        parameters=tuple(captured.parameters[node.name] for node in parameters),
        constants=tuple(node.name for node in constants),
        inputs=tuple(captured.inputs[node.name] for node in inputs),
        reads=tuple(live),
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


def _reused_nodes(captured: CapturedGraph, pattern: Pattern) -> dict[SiteOutput, fx.Node]:
    return {
        SiteOutput(site, index): node
        for site in sorted(pattern.reuse)
        for index, node in enumerate(captured.outputs_of(site))
    }


def _identifier(path: str) -> str:
    return re.sub(r"\W", "_", path)
