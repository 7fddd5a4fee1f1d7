"""Defines graphs that run with a model's parameters, with tables that say what their placeholders stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from harmonica_rt.errors import InvariantError
from harmonica_rt.graph.facts import is_mutating
from harmonica_rt.indices import PastOutput, SiteOutput

G = TypeVar("G", bound="ProgramGraph")


@dataclass(frozen=True, eq=False)
class TabledGraph:
    """A graph whose first placeholders are parameters, constants and inputs, and tables of what each stands for.

    Attributes:
        graph: the graph.
        parameters: for each parameter or buffer, its dotted name in the model.
        constants: for each constant, its placeholder's name in the captured graph.
        inputs: for each input, its index among the call's leaves.
    """

    graph: fx.Graph
    parameters: tuple[str, ...]
    constants: tuple[str, ...]
    inputs: tuple[int, ...]

    def bind(self, parameters: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """The parameters and constants that the graph takes, in its order; valid until one of them is replaced."""
        return (*(parameters[name] for name in self.parameters), *(constants[name] for name in self.constants))


@dataclass(frozen=True, eq=False)
class ProgramGraph(TabledGraph):
    """A graph that computes a step. Its type says how far it has been lowered.

    Placeholders come in the order parameters, constants, inputs, hoisted, reads; the field of each of these names has
    one entry per placeholder. The output node holds `(outputs, stored)`, two flat tuples.

    Attributes:
        reads: the values of site outputs that it takes from slots.
        stores: the site outputs that it returns to be stored.
        hoisted: names of the values that are known before the steps: weights, one tensor per device; once the graph is
            cut from its prologue, also what that computes.
    """

    reads: tuple[PastOutput, ...]
    stores: tuple[SiteOutput, ...]
    hoisted: tuple[str, ...] = ()

    @property
    def argument_nodes(self) -> list[fx.Node]:
        """All placeholders."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def read_nodes(self) -> list[fx.Node]:
        """The placeholders that stand for slots."""
        placeholders = self.argument_nodes
        return placeholders[len(placeholders) - len(self.reads) :]

    @property
    def result_nodes(self) -> list[Any]:
        """The flat outputs of the model: nodes and plain values."""
        return list(self.graph.output_node().args[0][0])  # type: ignore[index,arg-type]

    @property
    def stored_nodes(self) -> list[fx.Node]:
        """The values to store, one for each of `stores`."""
        return list(self.graph.output_node().args[0][1])  # type: ignore[index,arg-type]

    def become(self, kind: type[G], **changed: Any) -> G:
        """A graph of another type, with the same fields except those that changed; its invariants are checked.

        Raises:
            InvariantError: as `check_step_graph`.
        """
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        graph = kind(**{**kept, **changed})
        check_step_graph(graph)
        return graph


@dataclass(frozen=True, eq=False)
class StepGraph(ProgramGraph):
    """The captured graph specialised for one pattern, not yet lowered."""


def check_step_graph(step: ProgramGraph) -> None:
    """Check the invariants of a graph that computes a step.

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
    expected = len(step.parameters) + len(step.constants) + len(step.inputs) + len(step.hoisted) + len(step.reads)
    if placeholders != expected:
        raise InvariantError(f"step graph has {placeholders} placeholders, its tables name {expected}")
