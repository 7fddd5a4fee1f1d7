"""Several resolutions in one process: a plan for each, the one unused longest dropped."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import harmonica_rt as hrt
from tests.tiny import built, families, random_schedule, sample

PIXART = families()["pixart-alpha"]
STEPS = 4
SIZES = [(8, 8), (16, 8), (8, 16), (8, 8), (16, 8), (16, 8)]  # (16, 8) and (8, 16) have as many tokens


@pytest.mark.parametrize("max_plans", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_each_size_has_a_plan_and_the_one_unused_longest_is_dropped(
    max_plans: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="harmonica_rt")
    pipeline = built(PIXART.build)
    schedule = random_schedule(pipeline.transformer, STEPS, seed=1)
    calls = [{**PIXART.guided, "height": height, "width": width} for height, width in SIZES]
    hrt.reference(pipeline, schedule)
    expected = [sample(pipeline, STEPS, **call) for call in calls]
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, debug=True, max_plans=max_plans)
    for call, images in zip(calls, expected, strict=True):
        assert np.array_equal(sample(pipeline, STEPS, **call), images)
        report = hrt.get_compiled(pipeline).report()
        assert report.last_cur == pytest.approx(schedule.cur)
        assert len(report.plans) <= max_plans
    made = sum("planned" in line for line in caplog.messages)
    dropped = sum("dropped the plan" in line for line in caplog.messages)
    assert (made, dropped) == ((5, 3) if max_plans == 2 else (3, 0))
