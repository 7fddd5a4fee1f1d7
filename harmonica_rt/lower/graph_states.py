"""Defines the states of a step graph while it is lowered: a `StepGraph` is fused, cut from its prologue, and divided.

Each state is a type, so that a pass takes only what it can work on.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmonica_rt.plan.step_graph import ProgramGraph


@dataclass(frozen=True, eq=False)
class FusedGraph(ProgramGraph):
    """A step graph with calls of `torch.ops.harmonica` in it."""


@dataclass(frozen=True, eq=False)
class BodyGraph(ProgramGraph):
    """A step graph, fused or not, without what is computed before the steps."""


@dataclass(frozen=True, eq=False)
class DividedGraph(ProgramGraph):
    """A body in which calls of compiled regions replace the nodes of those regions."""
