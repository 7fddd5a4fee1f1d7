"""Weights in fused step graphs of each family."""

from __future__ import annotations

from typing import Any

import pytest

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from tests.models import random_weights
from tests.tiers import member
from tests.tiny import built, families, sample, shallow

FAMILIES = {**families(), "sd3": shallow("sd3"), "flux": shallow("flux")}
STEPS = 5


@pytest.mark.parametrize("name", [member(name, id=name, always=name == "flux") for name in FAMILIES])
def test_weighted_sums_in_fused_operators(name: str) -> None:
    """No weighted sum is a pass of its own, and errors are within the measured tolerance."""
    pipeline = built(FAMILIES[name].build)
    schedule = Schedule.random(0.5, steps=STEPS, sites=find_sites(pipeline.transformer), seed=2)
    schedule = random_weights(schedule, 3, seed=2)
    call: dict[str, Any] = {"num_inference_steps": STEPS, **FAMILIES[name].guided}
    assert hrt.verify(pipeline, schedule, lowering="fused", **call).ok
    hrt.compile(pipeline, schedule, lowering="fused", strict=True)
    sample(pipeline, STEPS, **FAMILIES[name].guided)
    for plan in hrt.get_compiled(pipeline).report().plans:
        assert all(program["forecast"] == program["weighted sums left"] == 0 for program in plan.fusion.programs)
