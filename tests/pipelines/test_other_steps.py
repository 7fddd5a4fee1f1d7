"""Pipelines that run other numbers of steps than there are schedules for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleMismatchError
from harmonica_rt.schedule import ScheduleSet
from tests.tiers import member
from tests.tiny import Family, built, families, random_schedule, sample, shallow, shallow_dit

STEPS = 6
DIT = Family(shallow_dit, {"class_labels": [1, 2], "guidance_scale": 2.0}, {"class_labels": [1, 2]})
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def heun_dit() -> Any:
    pipeline = built(shallow_dit)
    pipeline.scheduler = d.HeunDiscreteScheduler()
    return pipeline


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    return


def weighted(pipeline: Any, steps: int = STEPS, seed: int = 3) -> Schedule:
    return random_schedule(pipeline.transformer, steps, seed=seed).with_taylor()


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        member(name, steps, id=f"{name}-{steps}", always=(name, steps) in (("dit", 4), ("sd3", 9), ("flux", 9)))
        for name in ("dit", "sd3", "flux")
        for steps in (4, 9)
    ],
)
def test_a_resampled_run_equals_the_reference(name: str, steps: int) -> None:
    """Guidance doubles the batch (DiT, SD3), or calls twice in a step (Flux)."""
    family = DIT if name == "dit" else shallow(name)
    pipeline = built(family.build)
    schedule = weighted(pipeline)
    hrt.reference(pipeline, schedule.resample(steps))
    expected = sample(pipeline, steps, **family.guided)
    hrt.reference(pipeline, schedule, on_other_steps="resample")
    np.testing.assert_array_equal(sample(pipeline, steps, **family.guided), expected)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, on_other_steps="resample")
    np.testing.assert_array_equal(sample(pipeline, steps, **family.guided), expected)
    sample(pipeline, STEPS, **family.guided)
    assert hrt.get_compiled(pipeline).report().last_resampled_from is None
    np.testing.assert_array_equal(sample(pipeline, steps, **family.guided), expected)
    report = hrt.get_compiled(pipeline).report()
    assert (report.last_steps, report.last_resampled_from, report.last_catch_ups) == (steps, STEPS, ())
    assert report.last_cur == pytest.approx(schedule.resample(steps).cur)
    assert len(report.plans) == 2


def test_model_evaluations_count_and_not_inference_steps() -> None:
    pipeline = heun_dit()
    schedule = weighted(pipeline, 7)  # 4 inference steps of Heun
    hrt.reference(pipeline, schedule.resample(11))
    expected = sample(pipeline, 6, **DIT.guided)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, on_other_steps="resample")
    np.testing.assert_array_equal(sample(pipeline, 6, **DIT.guided), expected)
    report = hrt.get_compiled(pipeline).report()
    assert (report.last_steps, report.last_calls, report.last_resampled_from) == (11, 11, 7)
    sample(pipeline, 4, **DIT.guided)
    assert hrt.get_compiled(pipeline).report().last_resampled_from is None


@pytest.mark.parametrize(("asked", "strength", "first"), [(STEPS, 0.5, 3), (10, 0.6, None), (8, 0.5, 4), (12, 0.75, 3)])
def test_image_to_image_is_no_other_number_of_steps(asked: int, strength: float, first: int | None) -> None:
    """It takes the last rows: of the schedule, of one resampled to all steps, or all rows if just these run (10)."""
    family = shallow("sd3")
    pipeline = d.StableDiffusion3Img2ImgPipeline(**built(family.build).components)
    pipeline.set_progress_bar_config(disable=True)
    schedule = weighted(pipeline)
    call = {**family.guided, "image": IMAGE, "strength": strength}
    under = schedule if first is None else schedule.resample(asked)
    hrt.reference(pipeline, under)
    expected = sample(pipeline, asked, **call)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, on_other_steps="resample")
    np.testing.assert_array_equal(sample(pipeline, asked, **call), expected)
    report = hrt.get_compiled(pipeline).report()
    assert report.last_first == (first or 0)
    assert report.last_steps == under.steps
    assert report.last_resampled_from == (None if under is schedule else STEPS)


def test_a_plain_run_is_uncached(caplog: pytest.LogCaptureFixture) -> None:
    family = shallow("flux")
    pipeline = built(family.build)
    plain = {steps: sample(pipeline, steps, **family.guided) for steps in (4, 9)}
    schedule = weighted(pipeline)
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **family.guided)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, on_other_steps="plain")
    for _ in range(2):
        for steps, images in plain.items():
            np.testing.assert_array_equal(sample(pipeline, steps, **family.guided), images)
            report = hrt.get_compiled(pipeline).report()
            assert (report.last_calls, report.last_cur, report.last_uncached) == (2 * steps, 0.0, True)
        np.testing.assert_array_equal(sample(pipeline, STEPS, **family.guided), expected)
        assert not hrt.get_compiled(pipeline).report().last_uncached
    assert sum("is uncached" in message for message in caplog.messages) == len(plain)
    assert not [record for record in caplog.records if "without a call" in record.message]


def test_a_plain_run_that_begins_at_a_later_step() -> None:
    family = shallow("sd3")
    pipeline = d.StableDiffusion3Img2ImgPipeline(**built(family.build).components)
    pipeline.set_progress_bar_config(disable=True)
    call = {**family.guided, "image": IMAGE, "strength": 0.5}
    plain = sample(pipeline, 8, **call)
    hrt.compile(pipeline, weighted(pipeline), lowering="plain", strict=True, on_other_steps="plain")
    np.testing.assert_array_equal(sample(pipeline, 8, **call), plain)
    report = hrt.get_compiled(pipeline).report()
    assert (report.last_calls, report.last_steps, report.last_first) == (4, 8, 4)


def test_a_set_in_the_place_of_a_schedule() -> None:
    pipeline = built(shallow_dit)
    given = ScheduleSet([weighted(pipeline, 4), weighted(pipeline, 9)])
    hrt.compile(pipeline, given, lowering="plain", strict=True)
    for schedule in given.schedules:
        got = sample(pipeline, schedule.steps, **DIT.guided)
        compiled = hrt.get_compiled(pipeline)
        assert (compiled.report().last_steps, compiled.report().last_resampled_from) == (schedule.steps, None)
        hrt.reference(pipeline, schedule)
        np.testing.assert_array_equal(sample(pipeline, schedule.steps, **DIT.guided), got)
        hrt.compile(pipeline, given, lowering="plain", strict=True)
    with pytest.raises(ScheduleMismatchError, match="the schedules are for 4 and 9 steps, the pipeline asked for 7"):
        sample(pipeline, 7, **DIT.guided)


@pytest.mark.parametrize("lowering", ["plain", pytest.param("fused", marks=pytest.mark.exhaustive)])
def test_verify_of_other_steps(lowering: str) -> None:
    pipeline = built(shallow_dit)
    given = ScheduleSet([weighted(pipeline, 4), weighted(pipeline, 9)])
    for steps in (4, 7):
        report = hrt.verify(
            pipeline, given, lowering=lowering, on_other_steps="resample", num_inference_steps=steps, **DIT.guided
        )
        assert report.ok
        assert len(report.steps) == steps
    with pytest.raises(ScheduleMismatchError, match="compile with on_other_steps='resample'"):
        hrt.verify(pipeline, given, lowering=lowering, num_inference_steps=7, **DIT.guided)


def test_other_steps_after_an_error() -> None:
    """A run of a wrong number of steps leaves nothing behind."""
    pipeline = built(shallow_dit)
    schedule = weighted(pipeline)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    expected = sample(pipeline, STEPS, **DIT.guided)
    for _ in range(2):
        with pytest.raises(ScheduleMismatchError, match="the schedule is for 6 steps, but the pipeline asked for 7"):
            sample(pipeline, 7, **DIT.guided)
        np.testing.assert_array_equal(sample(pipeline, STEPS, **DIT.guided), expected)


@pytest.mark.parametrize("how", ["resample", "plain"])
def test_a_run_of_a_sampler(how: str) -> None:
    """`sample` has the same schedules as the pipeline's loop."""
    pipeline = built(families()["dit"].build)
    pipeline.scheduler = d.DDIMScheduler(clip_sample=False)
    schedule = weighted(pipeline)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, on_other_steps=how)
    compiled = hrt.get_compiled(pipeline)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = {"class_labels": torch.tensor([1, 2, 1000, 1000]), "guidance_scale": 2.0, "conditional_first": True}

    def sampled(model: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.sample(latents, pipeline.scheduler, **arguments, **options)
        return found

    for steps, begin in ((9, 4), (4, None), (STEPS, 2)):
        pipeline.scheduler.set_timesteps(steps)
        got = sampled(compiled, begin_index=begin)
        other = steps != STEPS
        report = compiled.report()
        assert (report.last_steps, report.last_first) == (steps, begin or 0)
        assert report.last_uncached == (other and how == "plain")
        assert report.last_resampled_from == (STEPS if other and how == "resample" else None)
        alone = Schedule.all_compute(steps=steps, sites=schedule.sites) if how == "plain" else schedule.resample(steps)
        under = alone if other else schedule
        model = hrt.reference(pipeline.transformer, under)
        assert torch.equal(got, sampled(model, begin_index=begin))
