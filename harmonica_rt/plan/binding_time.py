"""Finds the binding time of each value of a graph: what it depends on, and so how often it has to be computed.

Values that depend only on parameters, the timestep and the request can be computed before the run reaches them. A
site's output cannot, whatever it depends on: under the schedule it may come from an earlier step.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from harmonica_rt.call.roles import Role


class Binding(enum.IntFlag):
    """What a value depends on; 0 means parameters only."""

    PARAMETERS = 0
    TIMESTEP = 1
    REQUEST = 2
    LATENTS = 4


OF_ROLE = {Role.LATENTS: Binding.LATENTS, Role.TIMESTEP: Binding.TIMESTEP, Role.REQUEST: Binding.REQUEST}


def bindings(
    graph: fx.Graph, inputs: Mapping[str, int], roles: Sequence[Role], fixed: Collection[str], late: Collection[fx.Node]
) -> dict[fx.Node, Binding]:
    """The binding of every node of a functional graph.

    Args:
        graph: a captured graph, or a step graph.
        inputs: placeholder name -> index among the call's leaves.
        roles: the role of each leaf.
        fixed: names of the placeholders that are parameters or constants; a placeholder that is neither one of these
            nor an input counts as depending on the latents.
        late: nodes that count as depending on the latents, whatever their inputs depend on.
    """
    found: dict[fx.Node, Binding] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in inputs:
                found[node] = OF_ROLE[roles[inputs[node.name]]]
            else:
                found[node] = Binding.PARAMETERS if node.name in fixed else Binding.LATENTS
        elif node in late or not _is_function(node):
            found[node] = Binding.LATENTS
        else:
            found[node] = Binding.PARAMETERS
            for used in node.all_input_nodes:
                found[node] |= found[used]
    return found


def _is_function(node: fx.Node) -> bool:
    """Whether a node is a pure function of its inputs: it draws no random numbers and calls no subgraphs."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
