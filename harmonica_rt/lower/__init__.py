"""Lower: the step graphs of a plan -> programs that run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from harmonica_rt.capture.roles import Role
from harmonica_rt.lower.fused import FusedLowering
from harmonica_rt.lower.inductor import InductorLowering
from harmonica_rt.lower.plain import PlainLowering, Program
from harmonica_rt.passes.hoist import Prologue
from harmonica_rt.passes.specialise import StepGraph
from harmonica_rt.plan.plan import Plan

LOWERINGS = ("plain", "fused", "inductor")
DEFAULT = "fused"
HOISTED = "hoisted"  # fused without its ops, to tell what they bring
EXACT = ("plain",)  # equal to the reference bit for bit on CPU


class Lowering(Protocol):
    """A plan, lowered.

    Attributes:
        prologue: what is computed before the programs run; None where nothing is.
        programs: one for each of the plan's step graphs.
        fusions: fused calls of each program, by operator, and what was left; empty where nothing is fused.
        reasons: why it was left, with how many each, over all programs.
    """

    prologue: Prologue | None
    fusions: tuple[dict[str, int], ...]
    reasons: dict[str, int]
    programs: list[Program]

    def program(self, step: StepGraph) -> Program:
        """The program of a step graph that is none of the plan's."""


def lower(name: str, plan: Plan, roles: Sequence[Role]) -> Lowering:
    """Lower `plan` by the lowering called `name`, for calls whose leaves have `roles`."""
    if name == "plain":
        return PlainLowering(plan)
    if name == "inductor":
        return InductorLowering(plan, roles)
    return FusedLowering(plan, roles, ops=name != HOISTED)
