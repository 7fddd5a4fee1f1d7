"""Pipelines whose denoiser is torch.compile'd, with their scheduler attached."""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import HarmonicaError, ScheduleMismatchError
from harmonica_rt.schedule import ScheduleSet
from tests.tiny import built, families, random_schedule, sample, shallow, shallow_dit

STEPS = 4
CALL = {"class_labels": [1, 2], "guidance_scale": 2.0}


def compile_in(pipeline: Any, schedule: Schedule, *, in_place: bool) -> None:
    options = {"schedule": schedule, "lowering": "plain"}
    if in_place:
        pipeline.transformer.compile(backend="harmonica", options=options, fullgraph=True)
    else:
        pipeline.transformer = torch.compile(pipeline.transformer, backend="harmonica", options=options, fullgraph=True)


@pytest.fixture
def pipeline() -> Any:
    return built(shallow_dit)


# flux: true guidance calls twice per step, and its forward is wrapped
@pytest.mark.parametrize(
    ("family", "in_place", "steps", "attached"),
    [
        ("dit", False, 10, True),
        ("pixart-alpha", True, STEPS, False),
        ("flux", False, STEPS, True),
        pytest.param("dit", False, 20, False, marks=pytest.mark.exhaustive),
        pytest.param("pixart-alpha", True, STEPS, True, marks=pytest.mark.exhaustive),
        pytest.param("flux", False, STEPS, False, marks=pytest.mark.exhaustive),
    ],
)
def test_three_runs_give_the_images_of_compile_from_one_graph(
    family: str, in_place: bool, steps: int, attached: bool
) -> None:
    chosen = shallow(family) if family == "flux" else families()[family]
    pipeline = built(chosen.build)
    schedule = random_schedule(pipeline.transformer, steps)
    images = []
    for make in (hrt.reference, lambda *given: hrt.compile(*given, lowering="plain")):
        make(pipeline, schedule)
        images.append([sample(pipeline, steps, seed, **chosen.guided) for seed in range(3)])
        hrt.uncompile(pipeline)
    compile_in(pipeline, schedule, in_place=in_place)
    if attached:
        assert hrt.attach(pipeline) is pipeline
    counters.clear()
    images.append([sample(pipeline, steps, seed, **chosen.guided) for seed in range(3)])
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert counters["stats"]["unique_graphs"] == 1  # nothing is compiled again
    assert not counters["graph_break"]
    report = hrt.attach(pipeline.transformer).report()
    assert report.last_cur == pytest.approx(schedule.cur)
    assert report.last_catch_ups == ()


def test_a_replaced_scheduler_is_followed(pipeline: Any) -> None:
    schedule = random_schedule(pipeline.transformer, STEPS)
    compile_in(pipeline, schedule, in_place=False)
    hrt.attach(pipeline)
    sample(pipeline, STEPS, **CALL)
    pipeline.scheduler = d.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    got = sample(pipeline, STEPS, **CALL)
    pipeline.transformer = pipeline.transformer._orig_mod
    pipeline.scheduler = d.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    hrt.reference(pipeline, schedule)
    np.testing.assert_array_equal(got, sample(pipeline, STEPS, **CALL))


@pytest.mark.parametrize("attached", [True, False])
def test_another_number_of_steps_is_an_error(pipeline: Any, attached: bool) -> None:
    compile_in(pipeline, random_schedule(pipeline.transformer, STEPS), in_place=True)
    if attached:
        hrt.attach(pipeline)
    with pytest.raises(ScheduleMismatchError, match="the schedule is for 4 steps, but the pipeline asked for 5"):
        sample(pipeline, STEPS + 1, **CALL)
    sample(pipeline, STEPS, **CALL)


def test_a_call_outside_a_run_gives_what_the_plain_model_gives(pipeline: Any) -> None:
    schedule = random_schedule(pipeline.transformer, STEPS)
    call = {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "timestep": torch.tensor([7, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        plain = pipeline.transformer(**call).sample
        compile_in(pipeline, schedule, in_place=True)
        hrt.attach(pipeline)
        assert torch.equal(pipeline.transformer(**call).sample, plain)
    sample(pipeline, STEPS, **CALL)
    assert hrt.attach(pipeline.transformer).report().last_calls == STEPS


@pytest.mark.parametrize("attached", [True, False])
def test_the_schedule_compiled_last_is_used(pipeline: Any, attached: bool) -> None:
    first = random_schedule(pipeline.transformer, STEPS)
    second = random_schedule(pipeline.transformer, STEPS, seed=1)
    model = pipeline.transformer
    images = {}
    for name, schedule in (("first", first), ("second", second)):
        pipeline.transformer = model
        compile_in(pipeline, schedule, in_place=False)
        if attached:
            hrt.attach(pipeline)
        images[name] = sample(pipeline, STEPS, **CALL)
    assert not np.array_equal(images["first"], images["second"])
    hrt.attach(pipeline.transformer).detach()
    pipeline.transformer = model
    hrt.reference(pipeline, second)
    np.testing.assert_array_equal(images["second"], sample(pipeline, STEPS, **CALL))


def test_a_detached_session_is_not_attached_again_by_itself(pipeline: Any) -> None:
    compile_in(pipeline, random_schedule(pipeline.transformer, STEPS), in_place=False)
    sample(pipeline, STEPS, **CALL)
    session = hrt.attach(pipeline.transformer)
    assert session.pipelines == [pipeline]
    session.detach()
    session.reset()
    sample(pipeline, STEPS, **CALL)
    assert session.pipelines == []
    hrt.attach(pipeline)
    sample(pipeline, STEPS, **CALL)
    assert session.pipelines == [pipeline]


def test_only_pipelines_compiled_with_it_are_attached(pipeline: Any) -> None:
    with pytest.raises(HarmonicaError, match="DiTTransformer2DModel is not compiled with backend 'harmonica'"):
        hrt.attach(pipeline)
    schedule = random_schedule(pipeline.transformer, STEPS)
    hrt.compile(pipeline, schedule)
    with pytest.raises(HarmonicaError, match="not compiled with backend"):
        hrt.attach(pipeline)
    hrt.uncompile(pipeline)
    compile_in(pipeline, schedule, in_place=False)
    hrt.attach(pipeline)
    other = d.DiTPipeline(shallow_dit().transformer, pipeline.vae, pipeline.scheduler)
    compile_in(other, schedule, in_place=False)
    with pytest.raises(HarmonicaError, match="already drives another compiled model"):
        hrt.attach(other)


def test_a_schedule_for_another_model_is_refused(pipeline: Any) -> None:
    sites = ["transformer_blocks.0.attn9"]
    compile_in(pipeline, Schedule.every(2, steps=STEPS, sites=sites), in_place=False)
    with pytest.raises(ScheduleMismatchError, match=r"transformer_blocks\.0\.attn9"):
        hrt.attach(pipeline)
    with pytest.raises(BackendCompilerFailed, match=r"transformer_blocks\.0\.attn9"):
        sample(pipeline, STEPS, **CALL)


@pytest.mark.parametrize("how", ["resample", "plain"])
def test_other_numbers_of_steps_go_through_the_same_graph(pipeline: Any, how: str) -> None:
    schedule = random_schedule(pipeline.transformer, STEPS).with_taylor()
    plain = sample(pipeline, 7, **CALL)
    hrt.reference(pipeline, schedule.resample(7))
    expected = {7: sample(pipeline, 7, **CALL) if how == "resample" else plain}
    hrt.reference(pipeline, schedule)
    expected[STEPS] = sample(pipeline, STEPS, **CALL)
    hrt.uncompile(pipeline)
    options = {"schedule": schedule, "lowering": "plain", "on_other_steps": how}
    pipeline.transformer.compile(backend="harmonica", options=options, fullgraph=True)
    hrt.attach(pipeline)
    counters.clear()
    for steps in (7, STEPS, 7):
        np.testing.assert_array_equal(sample(pipeline, steps, **CALL), expected[steps])
    assert counters["stats"]["unique_graphs"] == 1
    report = hrt.attach(pipeline.transformer).report()
    assert (report.last_steps, report.last_uncached) == (7, how == "plain")
    assert len(report.plans) == (2 if how == "resample" else 1)


def test_the_backend_takes_a_set(pipeline: Any) -> None:
    given = ScheduleSet([random_schedule(pipeline.transformer, steps) for steps in (3, 5)])
    expected = []
    for schedule in given.schedules:
        hrt.reference(pipeline, schedule)
        expected.append(sample(pipeline, schedule.steps, **CALL))
    hrt.uncompile(pipeline)
    options = {"schedule": given, "lowering": "plain"}
    pipeline.transformer.compile(backend="harmonica", options=options, fullgraph=True)
    hrt.attach(pipeline)
    for steps, images in zip(given.steps, expected, strict=True):
        np.testing.assert_array_equal(sample(pipeline, steps, **CALL), images)
