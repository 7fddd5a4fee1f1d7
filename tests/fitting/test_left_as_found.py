"""A fit leaves the pipeline, the model and the random numbers as it found them, and refuses what it cannot fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule, ScheduleSet, find_sites
from harmonica_rt.errors import ArgumentError, HarmonicaError, ScheduleMismatchError
from harmonica_rt.pipelines.install import installed
from harmonica_rt.sampling.scheduler import listener_of
from tests.fitting.small import CALL, STEPS, every, run_of
from tests.models import stack
from tests.sampling.interruptions import interruptions, state
from tests.tiny import built, shallow_dit


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return built(shallow_dit)


def test_a_compiled_pipeline_is_left_compiled(pipeline: Any) -> None:
    schedule = every(2, pipeline.transformer)
    hrt.compile(pipeline, schedule)
    compiled = installed(pipeline.transformer)
    try:
        fitted = hrt.fit(pipeline, schedule, [CALL])
        assert installed(pipeline.transformer) is compiled
        assert listener_of(pipeline.scheduler) is compiled
    finally:
        hrt.uncompile(pipeline)
    assert fitted == hrt.fit(pipeline, schedule, [CALL])


def test_random_numbers_of_others_are_left_alone(pipeline: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    hrt.fit(pipeline, every(2, pipeline.transformer), [CALL])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_run_leaves_the_pipeline_as_it_was(pipeline: Any) -> None:
    before = state(pipeline.transformer)
    with pytest.raises(ScheduleMismatchError, match="5"):
        hrt.fit(pipeline, every(2, pipeline.transformer), [CALL, {**CALL, "num_inference_steps": 4}])
    assert state(pipeline.transformer) == before
    assert listener_of(pipeline.scheduler) is None


def test_an_interrupted_fit_leaves_the_model_as_it_was() -> None:
    model = stack(depth=1)
    before, schedule = state(model), every(2, model)
    tried = 0
    for interrupted in interruptions(lambda: hrt.fit(model, schedule, run_of(0)), most=6):
        tried += bool(interrupted)
        assert state(model) == before
    assert tried


def test_values_that_are_not_finite_are_refused() -> None:
    model = stack()
    with torch.no_grad():
        model.blocks[1].attn.weight.fill_(float("inf"))
    with pytest.raises(HarmonicaError, match=r"blocks\.\d\.\w+ returns NaN or infinity at step 1"):
        hrt.fit(model, every(2, model), run_of(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order must be a whole number of at least 1"),
        ({"order": 5}, "order must be at most 4"),
        ({"order": 2.0}, "order must be a whole number"),
        ({"per_site": "no"}, "per_site must be True or False"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"calls": []}, "holds 0 calls"),
        ({"calls": run_of(0)[:3]}, "holds 3 calls, the schedule has 5 steps"),
        ({"calls": {"latents": 1}}, "as dicts; got"),
        ({"calls": [1]}, "call 0 is"),
        ({"schedule": Schedule.all_compute(steps=STEPS, sites=find_sites(stack()))}, "reuses nothing"),
        ({"schedule": "every.json"}, "read it first"),
        ({"schedule": ScheduleSet([every(2, stack())])}, "fit each schedule of a set"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    model = stack()
    given = {"schedule": every(2, model), "calls": run_of(0), **change}
    with pytest.raises(ArgumentError, match=message):
        hrt.fit(model, given.pop("schedule"), given.pop("calls"), **given)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "calls is empty"),
        ([{"klass": 1}], "fit calls the pipeline, and DiTPipeline takes no klass"),
        ([{}], "cannot be called"),
    ],
)
def test_wrong_calls_of_a_pipeline_are_refused(pipeline: Any, calls: list[Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        hrt.fit(pipeline, every(2, pipeline.transformer), calls)
