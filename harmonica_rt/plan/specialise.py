"""Specialises the captured graph for one pattern: which sites are reused, which outputs are stored.

Requires: a functional captured graph. Ensures: every reused site is a slot read or a weighted sum of slots (a reused
span is that added to what enters it), nothing that fed only reused sites is left, every stored value is an extra
output, and no node is shared with the captured graph (parameters are shared: both graphs refer to them only by name).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.facts import needed_nodes
from harmonica_rt.graph.rebuild import Rebuild
from harmonica_rt.graph.residuals import residual_of, with_residual
from harmonica_rt.graph.weighted_sum import weighted_sum
from harmonica_rt.indices import PastOutput, SiteIndex, SiteOutput
from harmonica_rt.plan.step_graph import StepGraph, check_step_graph
from harmonica_rt.schedule.weights import MOST_WEIGHTS


@dataclass(frozen=True)
class Pattern:
    """Which sites a step reuses, and which outputs of those it computes are stored for a later step.

    Attributes:
        reuse: the sites it reuses.
        store: the outputs it stores.
        taken: of those that it reuses as weighted sums, the site and how many values it takes.
    """

    reuse: frozenset[SiteIndex]
    store: frozenset[SiteOutput]
    taken: frozenset[tuple[SiteIndex, int]] = frozenset()


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
    needed = _needed(captured, reads.values(), stores.values())

    rebuilt = Rebuild()
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder" and node in needed]
    parameters = [node for node in placeholders if node.name in captured.parameters]
    constants = [node for node in placeholders if node.name in captured.constants]
    inputs = [node for node in placeholders if node.name in captured.inputs]
    for node in (*parameters, *constants, *inputs):
        rebuilt.placeholder(node)
    live = {output: node for output, node in reads.items() if node in needed}
    past = _Past(rebuilt, captured, pattern, live)
    for node in captured.graph.nodes:
        if node in past.values:
            rebuilt[node] = with_residual(rebuilt, node, captured.bases.get(node), past.values[node])
        elif node in needed and node.op in ("call_function", "get_attr"):
            rebuilt.copy(node).meta["captured_name"] = node.name
    stored = [residual_of(rebuilt, node, captured.bases.get(node)) for node in stores.values()]
    step = StepGraph(
        graph=rebuilt.finish((rebuilt.new(tuple(results)), tuple(stored))),
        parameters=tuple(captured.parameters[node.name] for node in parameters),
        constants=tuple(node.name for node in constants),
        inputs=tuple(captured.inputs[node.name] for node in inputs),
        hoisted=past.weights,
        reads=past.reads,
        stores=tuple(stores),
    )
    check_step_graph(step)
    return step


def live_reads(captured: CapturedGraph, pattern: Pattern) -> list[SiteOutput]:
    """The outputs of reused sites that a step of this pattern actually reads."""
    reads = _reused_nodes(captured, pattern)
    stored = [captured.outputs_of(output.site)[output.output] for output in pattern.store]
    needed = _needed(captured, reads.values(), stored)
    return [output for output, node in reads.items() if node in needed]


def _needed(captured: CapturedGraph, read: Iterable[fx.Node], stored: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that a step with these reads and stores takes from the captured graph."""
    stores = list(stored)
    bases = [captured.bases[node] for node in stores if node in captured.bases]
    results: Any = captured.output.args[0]
    return needed_nodes([*results, *stores, *bases], set(read), captured.bases)


def _reused_nodes(captured: CapturedGraph, pattern: Pattern) -> dict[SiteOutput, fx.Node]:
    return {
        SiteOutput(site, index): node
        for site in sorted(pattern.reuse)
        for index, node in enumerate(captured.outputs_of(site))
    }


class _Past:
    """What a step takes from earlier steps: adds placeholders for weights and slots, and the weighted sums of slots.

    Attributes:
        values: for each live node, the slot or weighted sum that a step takes for it; for a span, its residual.
        weights: names of the weights, one tensor per device.
        reads: what is read, in the order of the placeholders.
    """

    def __init__(
        self, rebuilt: Rebuild, captured: CapturedGraph, pattern: Pattern, live: dict[SiteOutput, fx.Node]
    ) -> None:
        taken = dict(pattern.taken)
        cached = {node: captured.cached_value(node) for node in live.values()}
        weights: dict[torch.device, fx.Node] = {}
        for output, node in live.items():
            device = cached[node].device
            if output.site in taken and device not in weights:
                weights[device] = rebuilt.graph.placeholder(weights_name(device))
                shape = (len(captured.sites), MOST_WEIGHTS)
                weights[device].meta["val"] = cached[node].new_empty(shape, dtype=torch.float32)
        slots: dict[PastOutput, fx.Node] = {}
        for output, node in live.items():
            name = f"slot_{_identifier(captured.sites[output.site])}_{output.output}"
            for age in range(taken.get(output.site, 1)):
                slots[PastOutput(output, age)] = slot = rebuilt.graph.placeholder(f"{name}_{age}" if age else name)
                slot.meta["val"] = cached[node]
        self.values: dict[fx.Node, fx.Node] = {}
        for output, node in live.items():
            self.values[node] = slots[PastOutput(output, 0)]
            if output.site in taken:
                terms = [slots[PastOutput(output, age)] for age in range(taken[output.site])]
                arguments = (terms, weights[cached[node].device], int(output.site))
                self.values[node] = rebuilt.graph.call_function(weighted_sum, arguments)
                self.values[node].meta["val"] = cached[node]
        self.weights = tuple(node.name for node in weights.values())
        self.reads = tuple(slots)


def weights_name(device: torch.device) -> str:
    """The name of a step's weights on a device, among the hoisted values of a step graph."""
    return f"weights_{_identifier(str(device))}"


def _identifier(path: str) -> str:
    return re.sub(r"\W", "_", path)
