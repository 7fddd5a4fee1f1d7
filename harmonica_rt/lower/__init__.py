"""Lower: the step graphs of a plan -> programs that run.

In: a `Plan`, and the roles of its inputs. Out: a `Lowering`: one program per step graph, and the prologue, which is
everything computed before the steps. Plans of one captured graph share programs of equal patterns.

Hazard: fused operators round differently. Only `plain` can equal the reference bit for bit; the others are held to a
measured tolerance.

Reading order: `graph_states`, `plain`, `shared_programs` and `plain_lowering`, then `fused` with `hoist` (what does not
depend on the latents) and `equal_values`, `residual_pattern` and `norm_pattern` (what the operators replace; `casts`
says which casts they absorb) and `fuse`, with `weighted_terms` (sums of several stored values), `halves`,
`rotary_pattern` and `qk_pattern` (queries and keys) and `fuse_rotary`, both with `rewriting`; `joined_products` and
`joining_rule`; `epilogue`; `inductor` with `regions`, `compiled_region` and `faster_of_two`; `report` (what was done to
a plan); for `execute`, `cuda_graph_rules` says what a CUDA graph cannot hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from harmonica_rt.call.roles import Role
from harmonica_rt.lower.fused import FusedLowering
from harmonica_rt.lower.hoist import Prologue
from harmonica_rt.lower.inductor import InductorLowering
from harmonica_rt.lower.plain import Program
from harmonica_rt.lower.plain_lowering import PlainLowering
from harmonica_rt.lower.report import LoweringReport
from harmonica_rt.options import HOISTED
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.step_graph import StepGraph


class Lowering(Protocol):
    """A lowered plan.

    Attributes:
        programs: one for each of the plan's step graphs.
    """

    programs: list[Program]

    @property
    def prologue(self) -> Prologue | None:
        """What is computed before the programs run; None where nothing is."""

    def program(self, step: StepGraph) -> Program:
        """The program of a step graph that is not one of the plan's."""

    def for_plan(self, plan: Plan) -> Lowering | None:
        """The lowering of a plan of the same captured graph, which has this prologue and shares equal programs.

        None where the prologue would hold too much for the steps of that plan.
        """

    def report(self) -> LoweringReport:
        """What the lowering did to the plan."""


def lower(name: str, plan: Plan, roles: Sequence[Role], like: Lowering | None = None) -> Lowering:
    """Lower `plan` by the lowering called `name` (see `options`), for calls whose leaves have `roles`.

    `like` is a lowering of the same name, of another plan of the same captured graph: their equal programs are shared.
    """
    found = like.for_plan(plan) if like is not None else None
    if found is not None:
        return found
    if name == "plain":
        return PlainLowering(plan)
    if name == "inductor":
        return InductorLowering(plan, roles)
    return FusedLowering(plan, roles, ops=name != HOISTED)
