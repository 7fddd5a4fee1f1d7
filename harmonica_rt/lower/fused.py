"""The `fused` lowering uses harmonica ops, hoists values, and lets linear layers write directly into their slots.

It is faster than `plain` and equals it up to rounding: ops sum in another order, and a matrix product with one row
differs in its last bits from one with many rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from harmonica_rt.call.roles import Role
from harmonica_rt.lower.epilogue import with_epilogues
from harmonica_rt.lower.fuse import FusedStep, fuse
from harmonica_rt.lower.graph_states import BodyGraph, FusedGraph
from harmonica_rt.lower.hoist import Prologue, bindings_of, cut, plan_prologue
from harmonica_rt.lower.joined_products import Join, with_joins
from harmonica_rt.lower.joining_rule import choose_joins
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.report import FusionReport, HoistingReport, JoiningReport, LoweringReport
from harmonica_rt.plan.binding_time import Binding
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.step_graph import StepGraph


class FusedLowering:
    """The programs of a plan, and its prologue.

    Args:
        plan: the plan.
        roles: roles of the leaves of its calls.
        ops: whether to use harmonica ops; False lets a benchmark measure the rest alone.
    """

    rotary: ClassVar[bool] = True  # whether `norm_rotary` is among the ops

    def __init__(self, plan: Plan, roles: Sequence[Role], *, ops: bool = True) -> None:
        self._root = plan.captured.root
        self._ops = ops
        bound = bindings_of(plan.captured, roles)
        self._moving = frozenset(node.name for node, binding in bound.items() if binding & Binding.LATENTS)
        fused = [self._fuse(step) for step in plan.programs] if ops else []
        steps: list[StepGraph | FusedGraph] = [each.step for each in fused] if ops else list(plan.programs)
        prologue = plan_prologue(plan.captured, steps, roles, len(plan.steps))
        self._hoisted = frozenset(prologue.names)
        bodies = [cut(step, self._hoisted) for step in steps]
        counts = [sum(step.program == program for step in plan.steps) for program in range(len(bodies))]
        self._joins: tuple[Join, ...] = choose_joins(bodies, counts) if ops else ()
        joined = tuple(tensor for join in self._joins for tensor in join.tensors)
        self.prologue: Prologue | None = replace(prologue, joined=joined)
        self.programs = [self._program(with_joins(body, self._joins)) for body in bodies]
        self._fusion: FusionReport | None = None
        if ops:
            reasons: Counter[str] = sum((Counter(each.reasons) for each in fused), Counter())
            self._fusion = FusionReport(tuple(each.counts for each in fused), dict(reasons))

    def program(self, step: StepGraph) -> Program:
        """See `Lowering.program`."""
        body = cut(self._fuse(step).step if self._ops else step, self._hoisted)
        return self._program(with_joins(body, self._joins))

    def report(self) -> LoweringReport:
        """See `Lowering.report`."""
        prologue = self.prologue
        hoisting = HoistingReport(len(prologue.names), prologue.nbytes) if prologue is not None else HoistingReport()
        nbytes = sum(tensor.nbytes for join in self._joins for tensor in join.tensors)
        joining = JoiningReport(len(self._joins), sum(len(join.layers) for join in self._joins), nbytes)
        return LoweringReport(hoisting, joining, self._fusion)

    def _fuse(self, step: StepGraph) -> FusedStep:
        return fuse(step, rotary=self.rotary, moving=self._moving)

    def _program(self, body: BodyGraph) -> Program:
        return Program(with_epilogues(body), self._root, direct=True)
