"""One denoiser in several pipelines, and pipelines that change after they were compiled."""

from __future__ import annotations

import gc
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.pipelines_in_use.small import SD3
from tests.tiny import built, random_schedule, sample

STEPS = 6
IMAGE = {"image": torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), "strength": 0.5}


@pytest.fixture
def pipeline() -> Any:
    return built(SD3.build)


@pytest.fixture
def schedule(pipeline: Any) -> Schedule:
    return random_schedule(pipeline.transformer, STEPS, seed=3)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def other(pipeline: Any) -> Any:
    """Image-to-image with the same denoiser and a scheduler of its own."""
    own = d.FlowMatchEulerDiscreteScheduler(shift=2.0)
    return quiet(d.StableDiffusion3Img2ImgPipeline(**{**pipeline.components, "scheduler": own}))


def interrupted(pipeline: Any, after: int, **call: Any) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= after
        return {}

    sample(pipeline, STEPS, callback_on_step_end=stop, **call)


def compile_both(pipeline: Any, other: Any, schedule: Schedule) -> None:
    for each in (pipeline, other):
        hrt.compile(each, schedule, lowering="plain", strict=True, debug=True)


def references(pipeline: Any, other: Any, schedule: Schedule) -> tuple[Any, Any]:
    """Images of both, each by itself under the schedule."""
    hrt.reference(pipeline, schedule)
    whole = sample(pipeline, STEPS, **SD3.guided)
    hrt.uncompile(pipeline)
    hrt.reference(other, schedule)
    image = sample(other, STEPS, **SD3.guided, **IMAGE)
    hrt.uncompile(other)
    return whole, image


@pytest.mark.parametrize("keep", [True, False], ids=["both", "only the new one"])
def test_a_pipeline_made_by_from_pipe_is_compiled_as_well(pipeline: Any, schedule: Schedule, keep: bool) -> None:
    """What `from_pipe` makes has the same denoiser and the same scheduler, so it is compiled as well."""
    whole, image = references(pipeline, d.StableDiffusion3Img2ImgPipeline(**pipeline.components), schedule)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, debug=True)
    other = quiet(d.StableDiffusion3Img2ImgPipeline.from_pipe(pipeline))
    if not keep:
        del pipeline
        gc.collect()
    for _ in range(2):
        assert np.array_equal(sample(other, STEPS, **SD3.guided, **IMAGE), image)
        report = hrt.get_compiled(other).report()
        assert report.last_cur
        assert (report.last_first, report.last_catch_ups) == (3, (3,))
        if keep:
            assert np.array_equal(sample(pipeline, STEPS, **SD3.guided), whole)
            assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)
    hrt.uncompile(other)
    assert type(other.scheduler) is d.FlowMatchEulerDiscreteScheduler


def test_two_compiled_pipelines_may_share_a_denoiser(pipeline: Any, other: Any, schedule: Schedule) -> None:
    whole, image = references(pipeline, other, schedule)
    compile_both(pipeline, other, schedule)
    for _ in range(2):
        assert np.array_equal(sample(pipeline, STEPS, **SD3.guided), whole)
        report = hrt.get_compiled(pipeline).report()
        assert report.last_cur == pytest.approx(schedule.cur)
        assert report.last_first == 0
        assert np.array_equal(sample(other, STEPS, **SD3.guided, **IMAGE), image)
        assert hrt.get_compiled(other).report().last_first == 3


def test_one_pipeline_does_not_continue_an_interrupted_run_of_the_other(
    pipeline: Any, other: Any, schedule: Schedule
) -> None:
    whole, image = references(pipeline, other, schedule)
    compile_both(pipeline, other, schedule)
    interrupted(pipeline, 2, **SD3.guided)
    assert np.array_equal(sample(other, STEPS, **SD3.guided, **IMAGE), image)
    interrupted(other, 1, **SD3.guided, **IMAGE)
    assert np.array_equal(sample(pipeline, STEPS, **SD3.guided), whole)


def test_a_scheduler_replaced_in_one_pipeline_leaves_runs_of_the_other_alone(
    pipeline: Any, other: Any, schedule: Schedule
) -> None:
    whole, image = references(pipeline, other, schedule)
    compile_both(pipeline, other, schedule)
    other.scheduler = d.FlowMatchEulerDiscreteScheduler.from_config(other.scheduler.config)
    assert np.array_equal(sample(pipeline, STEPS, **SD3.guided), whole)
    assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)
    assert np.array_equal(sample(other, STEPS, **SD3.guided, **IMAGE), image)
    assert hrt.get_compiled(pipeline).report().last_first == 3


def test_a_callback_that_runs_the_other_pipeline_ends_the_outer_run(
    pipeline: Any, other: Any, schedule: Schedule
) -> None:
    """The outer run is over with it: its other steps are computed plainly, not with what the inner one stored."""
    nothing = Schedule.all_compute(steps=STEPS, sites=schedule.sites)
    by_half = Schedule.from_array(
        np.where(np.arange(STEPS)[:, None] < 3, schedule.compute, nothing.compute), sites=schedule.sites
    )
    hrt.reference(pipeline, by_half)
    expected = sample(pipeline, STEPS, **SD3.guided)
    compile_both(pipeline, other, schedule)

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            interrupted(other, 1, **SD3.guided, **IMAGE)
        return {}

    assert np.array_equal(sample(pipeline, STEPS, callback_on_step_end=preview, **SD3.guided), expected)


@pytest.mark.parametrize("stopped", [False, True], ids=["after a whole run", "after an interrupted one"])
def test_a_pipeline_that_was_not_compiled_runs_plainly(
    pipeline: Any, other: Any, schedule: Schedule, stopped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the compiled denoiser, and a scheduler of its own, that nobody follows."""
    plain = sample(other, STEPS, **SD3.guided, **IMAGE)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, debug=True)
    if stopped:
        interrupted(pipeline, 2, **SD3.guided)
    else:
        sample(pipeline, STEPS, **SD3.guided)
    assert np.array_equal(sample(other, STEPS, **SD3.guided, **IMAGE), plain)
    assert any("outside a sampling run" in line for line in caplog.messages)


@pytest.mark.parametrize("lowering", ["plain", pytest.param("fused", marks=pytest.mark.exhaustive)])
def test_a_change_of_dtype_and_back_makes_one_new_plan(
    pipeline: Any, schedule: Schedule, lowering: str, caplog: pytest.LogCaptureFixture
) -> None:
    hrt.reference(pipeline, schedule)
    expected = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipeline.to(dtype)
        expected[dtype] = sample(pipeline, STEPS, **_in(dtype))
    pipeline.to(torch.float32)
    # weights are rounded once and for all, so the first of the two is of those that were rounded
    expected[torch.float32] = sample(pipeline, STEPS, **_in(torch.float32))
    hrt.compile(pipeline, schedule, lowering=lowering, strict=True, debug=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        pipeline.to(dtype)
        got = sample(pipeline, STEPS, **_in(dtype))
        assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)
        if lowering == "plain":
            assert np.array_equal(got, expected[dtype])
        else:
            largest = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
            assert np.abs(got - expected[dtype]).max() < largest * np.abs(expected[dtype]).max()
    changes = [line for line in caplog.messages if "captured again" in line]
    assert len(changes) == 1  # and back it finds the plans that there were
    assert "float32 on cpu to [" in changes[0]


def _in(dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in SD3.guided.items()}


@pytest.mark.gpu
def test_a_pipeline_may_move_to_a_gpu_and_back(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    on_cpu = sample(pipeline, STEPS, **SD3.guided)
    for device in ("cuda", "cpu"):
        pipeline.to(device)
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in SD3.guided.items()}
        np.testing.assert_allclose(sample(pipeline, STEPS, **moved), on_cpu, rtol=1e-3, atol=1e-3)
        assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)
