"""The `fused` lowering uses harmonica ops, hoists values, and lets linear layers write directly into their slots.

It is faster than `plain` and equals it up to rounding: ops sum in another order, and a matrix product with one row
differs in its last bits from one with many rows.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

from harmonica_rt.call.roles import Role
from harmonica_rt.lower.epilogue import with_epilogues
from harmonica_rt.lower.fuse import FusedStep, fuse
from harmonica_rt.lower.graph_states import BodyGraph, FusedGraph
from harmonica_rt.lower.hoist import LIMIT, Prologue, bindings_of, cut, plan_prologue
from harmonica_rt.lower.joined_products import Join, with_joins
from harmonica_rt.lower.joining_rule import choose_joins
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.report import FusionReport, HoistingReport, JoiningReport, LoweringReport
from harmonica_rt.lower.shared_programs import SharedPrograms
from harmonica_rt.plan.binding_time import Binding
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.specialise import Pattern
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
        self.prologue: Prologue = replace(prologue, joined=joined)
        self.programs = [self._program(with_joins(body, self._joins)) for body in bodies]
        self._shared = SharedPrograms()
        self._patterns = plan.patterns
        self._fused = {
            pattern: (each.counts, each.reasons) for pattern, each in zip(plan.patterns, fused, strict=False)
        }

    def program(self, step: StepGraph) -> Program:
        """See `Lowering.program`."""
        return self._lowered(self._fuse(step).step if self._ops else step)

    def for_plan(self, plan: Plan) -> Self | None:
        """See `Lowering.for_plan`."""
        made = copy.copy(self)
        made.prologue, made._patterns = self.prologue.for_steps(len(plan.steps)), plan.patterns
        if made.prologue.nbytes > max(LIMIT, self.prologue.nbytes):
            return None
        self._shared.add(self._patterns, self.programs)
        made.programs = self._shared.of(plan, made._program_of)
        return made

    def report(self) -> LoweringReport:
        """See `Lowering.report`."""
        hoisting = HoistingReport(len(self.prologue.names), self.prologue.nbytes)
        nbytes = sum(tensor.nbytes for join in self._joins for tensor in join.tensors)
        joining = JoiningReport(len(self._joins), sum(len(join.layers) for join in self._joins), nbytes)
        return LoweringReport(hoisting, joining, self._fusion() if self._ops else None)

    def _fusion(self) -> FusionReport:
        fused = [self._fused[pattern] for pattern in self._patterns]
        reasons: Counter[str] = sum((Counter(reasons) for _, reasons in fused), Counter())
        return FusionReport(tuple(counts for counts, _ in fused), dict(reasons))

    def _program_of(self, pattern: Pattern, step: StepGraph) -> Program:
        """The program of a pattern that no plan of this captured graph had before."""
        if not self._ops:
            return self._lowered(step)
        fused = self._fuse(step)
        self._fused[pattern] = (fused.counts, fused.reasons)
        return self._lowered(fused.step)

    def _lowered(self, step: StepGraph | FusedGraph) -> Program:
        return self._program(with_joins(cut(step, self._hoisted), self._joins))

    def _fuse(self, step: StepGraph) -> FusedStep:
        return fuse(step, rotary=self.rotary, moving=self._moving)

    def _program(self, body: BodyGraph) -> Program:
        return Program(with_epilogues(body), self._root, direct=True)
