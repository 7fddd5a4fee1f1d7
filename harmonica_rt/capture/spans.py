"""Pairs what leaves a span of blocks with what enters it, by following the residual additions in between.

A span caches residuals: what leaves, less the value that it grew from. Blocks with several streams (text and image)
have one pair per stream. Between two blocks of a span something else may happen (a ControlNet adds to the stream):
what is not in a block counts as entering.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.graph.facts import is_item
from harmonica_rt.graph.residual_origin import Origin, Whole, origin_after


def find_bases(
    graph: fx.Graph,
    inside: Mapping[fx.Node, int],
    outputs: Mapping[int, Sequence[fx.Node]],
    sites: Sequence[str],
    fixed: Collection[str],
) -> dict[fx.Node, fx.Node]:
    """For each output of a span, the node outside the span that it is a residual of.

    Args:
        graph: a functional graph.
        inside: the nodes inside of sites, with the index of the site.
        outputs: index of a span -> its output nodes.
        sites: names of all sites, for messages.
        fixed: names of the placeholders that are parameters or constants: nothing grows from these.

    Raises:
        CaptureError: an output of a span is a residual of nothing that enters it, with `Obstacle.SPAN`.
    """
    bases: dict[fx.Node, fx.Node] = {}
    for site, nodes in outputs.items():
        origins = _origins(graph, {node for node, owner in inside.items() if owner == site}, fixed)
        for node in nodes:
            origin = origins.get(node, [None])[0]
            if not isinstance(origin, Whole) or _shape(origin.value) != _shape(node):
                detail = f"{sites[site]} gives a value that it did not add to one that enters it"
                raise CaptureError(
                    CaptureFailure(Obstacle.SPAN, detail, node=node.name, stack=node.meta.get("stack_trace"))
                )
            bases[node] = origin.value
    return bases


def _origins(graph: fx.Graph, span: Collection[fx.Node], fixed: Collection[str]) -> dict[fx.Node, list[Origin | None]]:
    """The origins of the results of each node in a span."""
    found: dict[fx.Node, list[Origin | None]] = {}

    def origin_of(value: Any) -> Origin | None:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return None
        if value in span:
            return found[value][0]
        floating = value.meta["val"].is_floating_point() or value.meta["val"].is_complex()
        return Whole(value) if floating and value.name not in fixed else None

    for node in graph.nodes:
        if node not in span:
            continue
        if is_item(node):
            origins = found.get(node.args[0], [])
            found[node] = [origins[node.args[1]] if node.args[1] < len(origins) else None]
            continue
        values = node.meta.get("val")
        results = values if isinstance(values, list | tuple) else [values]
        if not all(isinstance(value, torch.Tensor) for value in results):
            found[node] = [None] * len(results)
            continue
        shapes = [tuple(value.shape) for value in results]
        found[node] = origin_after(node.target, node.args, shapes, origin_of, _shape)
    return found


def _shape(value: Any) -> tuple[int, ...] | None:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None
