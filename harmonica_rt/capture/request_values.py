"""The values of a request that a captured graph holds for, and the small graph that computes them.

Hazard: a graph traced with the values of one call is silently wrong for a call with other values. So a captured graph
is kept with what it took for granted: the small graph is run when a run begins and when the request changes, and other
values need another captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from harmonica_rt.graph.facts import needed_nodes
from harmonica_rt.graph.rebuild import Rebuild

Values = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class RequestValues:
    """What a captured graph took for granted about the values of its request.

    Attributes:
        compute: computes the values from leaves of a call.
        inputs: indices of the leaves that it takes.
        values: the values that it gave at capture.
    """

    compute: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[int, ...]
    values: tuple[torch.Tensor, ...]

    def hold(self, leaves: Sequence[Any]) -> bool:
        """Whether a call with these leaves has the values that the graph was made for. Waits for their device."""
        found = self.compute(*(leaves[index] for index in self.inputs))
        return all(torch.equal(a.cpu(), b) for a, b in zip(found, self.values, strict=True))

    @property
    def key(self) -> Values:
        """The values in a form that can be compared and hashed."""
        return tuple(tuple(value.flatten().tolist()) for value in self.values)


def request_values_of(
    exported: torch.export.ExportedProgram,
    read: Sequence[fx.Node],
    values: Sequence[torch.Tensor],
    inputs: Mapping[str, int],
    constants: Mapping[str, torch.Tensor],
) -> RequestValues | None:
    """The values of its request that a model asked for; None if it asked for none.

    Args:
        exported: the traced model.
        read: the nodes whose values it asked for.
        values: those values.
        inputs: placeholder name -> index among the call's leaves.
        constants: placeholder name -> tensor created by tracing.
    """
    if not read:
        return None
    needed = needed_nodes(read)
    rebuilt, holder = Rebuild(), nn.Module()
    taken: list[int] = []
    for node in exported.graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr" or node.name in constants:
            constant = constants[node.name] if node.name in constants else getattr(exported.graph_module, node.target)
            name = f"constant_{len(rebuilt)}"
            if isinstance(constant, nn.Module):  # a nested graph
                holder.add_module(name, constant)
            else:
                holder.register_buffer(name, constant)
            rebuilt[node] = rebuilt.graph.get_attr(name)
            continue
        if node.op == "placeholder":
            taken.append(inputs[node.name])
        rebuilt.copy(node)
    graph = rebuilt.finish(rebuilt.new(tuple(read)))
    return RequestValues(fx.GraphModule(holder, graph, "RequestValues").forward, tuple(taken), tuple(values))
