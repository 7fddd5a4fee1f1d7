"""The `fused` lowering: harmonica ops, hoisted values, linear layers that write into their slots.

Faster than `plain` and equal to it up to rounding: ops add up in another order, and a product of one row gives other
last bits than a product of many.
"""

from __future__ import annotations

from collections.abc import Sequence

from harmonica_rt.capture.roles import Role
from harmonica_rt.lower.plain import Program
from harmonica_rt.passes.hoist import Prologue, cut, plan_prologue
from harmonica_rt.passes.specialise import StepGraph
from harmonica_rt.plan.plan import Plan


class FusedLowering:
    """The programs of a plan, and its prologue."""

    def __init__(self, plan: Plan, roles: Sequence[Role]) -> None:
        self._root = plan.captured.root
        self.prologue: Prologue | None = plan_prologue(plan.captured, plan.programs, roles, len(plan.steps))
        self._hoisted = frozenset(self.prologue.names)
        self.programs = [self.program(step) for step in plan.programs]

    def program(self, step: StepGraph) -> Program:
        """See `Lowering.program`."""
        return Program(cut(step, self._hoisted), self._root, direct=True)
