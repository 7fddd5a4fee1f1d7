"""Models on a fake `cuda:0`, planned under a schedule that reuses every site in every second step."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.roles import Role
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.lower.cuda_graph_rules import obstacle
from harmonica_rt.plan.plan import Plan
from tests.fake_cuda.gpu import FakeGpu
from tests.fake_cuda.launches import launches
from tests.fake_cuda.valued import DEVICE

STEPS = 4


@dataclass(frozen=True, eq=False)
class Planned:
    """A model on `cuda:0`, and its plan under `Schedule.every(2)`: a step in full, a step that reuses every site."""

    gpu: FakeGpu
    model: nn.Module
    arguments: Mapping[str, Any]
    plan: Plan
    roles: tuple[Role, ...]

    @functools.cache  # noqa: B019  # tests end with their process
    def lowered(self, lowering: str) -> LoweredPlan:
        return LoweredPlan(self.plan, self.roles, lowering)

    def launches(self, lowering: str) -> tuple[int, ...]:
        programs = self.lowered(lowering).lowering.programs
        return tuple(launches(program, direct=lowering != "plain").total() for program in programs)

    def refusals(self, lowering: str) -> list[str]:
        """Why programs or parts of the prologue cannot be recorded."""
        lowered = self.lowered(lowering).lowering
        graphs = [program.step for program in lowered.programs]
        parts = [lowered.prologue.once, lowered.prologue.each] if lowered.prologue is not None else []
        return [str(found) for graph in (*graphs, *parts) if (found := obstacle(graph, DEVICE)) is not None]


def planned(gpu: FakeGpu, model: nn.Module, arguments: Mapping[str, Any]) -> Planned:
    plan, roles = gpu.plan(model, arguments, Schedule.every(2, steps=STEPS, sites=find_sites(model)))
    return Planned(gpu, model, arguments, plan, roles)
