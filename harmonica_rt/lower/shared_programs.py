"""Shares the programs of equal patterns between the plans of one captured graph: those of other numbers of steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.specialise import Pattern
from harmonica_rt.plan.step_graph import StepGraph


class SharedPrograms:
    """The programs of several plans by their pattern. Each lives as long as a plan that has it."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[Pattern, Program] = weakref.WeakValueDictionary()

    def add(self, patterns: Sequence[Pattern], programs: Sequence[Program]) -> None:
        """Share the programs of a plan, one for each of its patterns."""
        self._held.update(zip(patterns, programs, strict=True))

    def of(self, plan: Plan, make: Callable[[Pattern, StepGraph], Program]) -> list[Program]:
        """A program for each step graph of a plan; `make` makes those of patterns that no plan had before."""
        programs = []
        for pattern, step in zip(plan.patterns, plan.programs, strict=True):
            found = self._held.get(pattern)
            programs.append(make(pattern, step) if found is None else found)
        self.add(plan.patterns, programs)
        return programs
