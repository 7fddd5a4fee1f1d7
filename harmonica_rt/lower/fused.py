"""The `fused` lowering uses harmonica ops, hoists values, and lets linear layers write directly into their slots.

It is faster than `plain` and equals it up to rounding: ops sum in another order, and a matrix product with one row
differs in its last bits from one with many rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from harmonica_rt.call.roles import Role
from harmonica_rt.lower.epilogue import with_epilogues
from harmonica_rt.lower.fuse import FusedStep, fuse
from harmonica_rt.lower.graph_states import FusedGraph
from harmonica_rt.lower.hoist import Prologue, bindings_of, cut, plan_prologue
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.report import FusionReport, HoistingReport, LoweringReport
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
        self.prologue: Prologue | None = plan_prologue(plan.captured, steps, roles, len(plan.steps))
        self._hoisted = frozenset(self.prologue.names)
        self.programs = [self._program(step) for step in steps]
        self._fusion: FusionReport | None = None
        if ops:
            reasons: Counter[str] = sum((Counter(each.reasons) for each in fused), Counter())
            self._fusion = FusionReport(tuple(each.counts for each in fused), dict(reasons))

    def program(self, step: StepGraph) -> Program:
        """See `Lowering.program`."""
        return self._program(self._fuse(step).step if self._ops else step)

    def report(self) -> LoweringReport:
        """See `Lowering.report`."""
        prologue = self.prologue
        hoisting = HoistingReport(len(prologue.names), prologue.nbytes) if prologue is not None else HoistingReport()
        return LoweringReport(hoisting, self._fusion)

    def _fuse(self, step: StepGraph) -> FusedStep:
        return fuse(step, rotary=self.rotary, moving=self._moving)

    def _program(self, step: StepGraph | FusedGraph) -> Program:
        return Program(with_epilogues(cut(step, self._hoisted)), self._root, direct=True)
