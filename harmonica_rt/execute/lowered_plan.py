"""A lowered plan: the plan, its step programs and its prologue, ready to run with any parameters."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.call.roles import Role
from harmonica_rt.execute.lowered_prologue import LoweredPrologue
from harmonica_rt.graph.facts import device_of
from harmonica_rt.indices import SlotId, StepIndex
from harmonica_rt.lower import Lowering, lower
from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.weight_tables import weight_tables


class LoweredPlan:
    """A plan with its programs and its prologue.

    Args:
        plan: the plan.
        roles: roles of the leaves of its calls.
        lowering: one of `harmonica_rt.options.LOWERINGS`.
        like: a plan of the same captured graph, lowered by the same lowering, to share programs and prologue with.

    Attributes:
        plan, roles: as given.
        lowering: the programs of the plan's step graphs, and a report on them.
        prologue: what is computed before the steps; None where nothing is.
        weights: the weights of all steps by name, `[steps, sites, 4]` each; see `weight_tables`.
        seconds: wall time of lowering.
    """

    def __init__(self, plan: Plan, roles: Sequence[Role], lowering: str, *, like: LoweredPlan | None = None) -> None:
        started = time.perf_counter()
        self.plan = plan
        self.roles = tuple(roles)
        self.lowering: Lowering = lower(lowering, plan, roles, like.lowering if like is not None else None)
        prologue = self.lowering.prologue
        self.prologue: LoweredPrologue | None = None
        if prologue is not None:
            before = like.prologue if like is not None else None
            same = before is not None and before.prologue.each is prologue.each
            self.prologue = before if same else LoweredPrologue(prologue, plan.captured.root)
        self.weights = weight_tables(plan)
        self.seconds = time.perf_counter() - started
        self._catch_up: dict[StepIndex, tuple[Program, tuple[SlotId, ...]]] = {}

    def program(self, step: StepIndex) -> Program:
        """The program of a step."""
        return self.lowering.programs[self.plan.steps[step].program]

    def catch_up(self, step: StepIndex) -> tuple[Program, tuple[SlotId, ...]]:
        """The program that computes `step` in full, and the slots it fills."""
        if step not in self._catch_up:
            graph, slots = self.plan.catch_up_graph(step)
            self._catch_up[step] = self.lowering.program(graph), slots
        return self._catch_up[step]

    def nested(self, outputs: tuple[Any, ...]) -> Any:
        """The model's own kind of return value, made of these flat outputs."""
        return outputs if self._returns_flat_tuple else pytree.tree_unflatten(outputs, self.plan.captured.out_spec)

    def devices(self) -> set[torch.device]:
        """The devices of its inputs, parameters and slots."""
        found = map(device_of, self._placeholders())
        return {*self.plan.table.arena_bytes, *(device for device in found if device is not None)}

    @functools.cached_property
    def _returns_flat_tuple(self) -> bool:
        spec = self.plan.captured.out_spec
        numbers = tuple(range(spec.num_leaves))
        nested = pytree.tree_unflatten(numbers, spec)
        return type(nested) is tuple and nested == numbers

    @functools.cached_property
    def takes_inputs_on_cpu(self) -> bool:
        """Whether all inputs of a call are on the CPU, where the host can read them."""
        inputs = [node for node in self._placeholders() if node.name in self.plan.captured.inputs]
        return all(node.meta["val"].device.type == "cpu" for node in inputs)

    def _placeholders(self) -> list[Any]:
        nodes: list[fx.Node] = self.plan.captured.graph.find_nodes(op="placeholder")
        return nodes
