"""Samplers whose number of model evaluations is not the number of steps they were asked for."""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleMismatchError
from tests.tiny import families, random_schedule, sample

# KDPM2 hands tensors to numpy functions, which call their __array_wrap__ in a way that is going away
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

PIXART = families()["pixart-alpha"]
ASKED = 4
TABLE = [
    (d.HeunDiscreteScheduler, {}, 7),
    (d.KDPM2DiscreteScheduler, {}, 7),
    (d.KDPM2AncestralDiscreteScheduler, {}, 7),
    (d.PNDMScheduler, {"skip_prk_steps": True}, 5),
    (d.PNDMScheduler, {}, 13),
    (d.UniPCMultistepScheduler, {}, 4),
    (d.EulerAncestralDiscreteScheduler, {}, 4),
]
IDS = [cls.__name__.removesuffix("Scheduler") + "".join(f"-{key}" for key in config) for cls, config, _ in TABLE]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    torch.manual_seed(0)
    built = PIXART.build()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(params=TABLE, ids=IDS)
def nfe(request: pytest.FixtureRequest, pipeline: Any) -> int:
    scheduler, config, evaluations = request.param
    pipeline.scheduler = scheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, **config)
    result: int = evaluations
    return result


def test_a_run_uses_the_whole_schedule_and_no_more(pipeline: Any, nfe: int) -> None:
    schedule = random_schedule(pipeline.transformer, nfe)
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, ASKED, **PIXART.guided)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    try:
        got = sample(pipeline, ASKED, **PIXART.guided)
        report = hrt.get_compiled(pipeline).report()
    finally:
        hrt.uncompile(pipeline)
    assert np.array_equal(got, expected)
    assert report.last_calls == nfe
    assert report.last_catch_ups == ()
    assert report.last_cur == pytest.approx(schedule.cur)


def test_a_schedule_for_another_number_is_refused(pipeline: Any, nfe: int) -> None:
    schedule = Schedule.every(2, steps=nfe + 1, sites=hrt.find_sites(pipeline.transformer))
    hrt.compile(pipeline, schedule, lowering="plain")
    try:
        with pytest.raises(ScheduleMismatchError, match=f"for {nfe + 1} steps, but the pipeline asked for {nfe} "):
            sample(pipeline, ASKED, **PIXART.guided)
    finally:
        hrt.uncompile(pipeline)
