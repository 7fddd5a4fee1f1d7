"""Launches and bytes of steps with weights: those of plain reuse, and what else they read is the other values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the models are diffusers'")

from benchmarks.roofline.cases import MetaCase
from benchmarks.roofline.kernel import Kernel, work
from benchmarks.roofline.programs import programs_of
from harmonica_kernels import forecast
from harmonica_rt import Schedule
from harmonica_rt.plan.plan import build_plan
from tests.benchmarks.one_site import BF16, eager
from tests.benchmarks.test_roofline_models import D, dit, flux, names, pixart

STEPS, BLOCKS = 8, 2


def partial_steps(case: MetaCase, order: int, lowering: str = "fused") -> list[list[Kernel]]:
    """The kernels of each program but the first under every(2), with so many weights in its later steps; 1: none."""
    schedule = Schedule.every(2, steps=STEPS, sites=case.captured.sites)
    if order > 1:
        full = [1.5, -0.75, 0.5, -0.25][:order]
        rows = [full if step // 2 + 1 >= order else [1.0] + [0.0] * (order - 1) for step in range(STEPS)]
        schedule = schedule.with_weights(rows)
    plan = build_plan(case.captured, schedule)
    return programs_of(lowering, plan, case.roles).kernels[1:]


@pytest.mark.parametrize("order", [2, 4])
def test_weights_cost_no_launch_and_what_they_read(order: int) -> None:
    case = dit(BLOCKS)
    [plain], [weighted] = partial_steps(case, 1), partial_steps(case, order)
    assert names(weighted) == names(plain)
    x, entries = 2 * 256 * D * BF16, 2 * BLOCKS
    a, b = work(plain), work(weighted)
    assert b[1] - a[1] == (order - 1) * entries * x + order * entries * 4  # other values, and fp32 weights
    assert (b[2], b[3]) == (a[2], a[3])


def test_without_operators_each_sum_is_passes_of_its_own() -> None:
    """The comparison above would be worth nothing if weights cost nothing anywhere."""
    case = dit(BLOCKS)
    [plain], [weighted] = partial_steps(case, 1, "plain"), partial_steps(case, 2, "plain")
    assert len(weighted) >= len(plain) + 3 * 2 * BLOCKS


@pytest.mark.parametrize(
    "build", [lambda: pixart(2), pytest.param(lambda: flux(1), marks=pytest.mark.exhaustive)], ids=["pixart", "flux"]
)
def test_other_models_launch_as_many(build: Any) -> None:
    case = build()
    [plain], [weighted] = partial_steps(case, 1), partial_steps(case, 2)
    assert len(weighted) == len(plain)
    assert work(weighted)[2] == work(plain)[2]


def test_bytes_of_a_forecast() -> None:
    weights = torch.empty(28, 4, device="meta")
    [kernel] = eager(lambda x, y: forecast([x, y, y], weights.to(x.device), [4, 5, -1]), torch.empty(2, 8), (2, 8))
    assert (kernel.name, kernel.read, kernel.written) == ("harmonica.forecast", 2 * 16 * BF16 + 2 * 4, 16 * BF16)
