"""The `plain` lowering: the step graphs of a plan as they are."""

from __future__ import annotations

import copy
from typing import Self

from harmonica_rt.lower.hoist import Prologue
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.report import LoweringReport
from harmonica_rt.lower.shared_programs import SharedPrograms
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.step_graph import StepGraph


class PlainLowering:
    """The programs of a plan: its step graphs as they are."""

    def __init__(self, plan: Plan) -> None:
        self._root = plan.captured.root
        self._shared = SharedPrograms()
        self.prologue: Prologue | None = None
        self.programs = self._shared.of(plan, lambda _, step: self.program(step))

    def program(self, step: StepGraph) -> Program:
        """See `Lowering.program`."""
        return Program(step, self._root)

    def for_plan(self, plan: Plan) -> Self:
        """See `Lowering.for_plan`."""
        made = copy.copy(self)
        made.programs = self._shared.of(plan, lambda _, step: self.program(step))
        return made

    def report(self) -> LoweringReport:
        """See `Lowering.report`."""
        return LoweringReport()
