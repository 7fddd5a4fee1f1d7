"""Image-to-image and inpainting begin at a later step: they go by the last rows of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.errors import RunError, ScheduleMismatchError
from tests.pipelines_in_use.small import FLUX, SD3
from tests.tiny import random_schedule, sample
from tests.truth import Pair, pair

STEPS = 10
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., :4] = 1.0

WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sd3 image": (SD3, d.StableDiffusion3Img2ImgPipeline, {"image": IMAGE}),
    "sd3 inpaint": (SD3, d.StableDiffusion3InpaintPipeline, {"image": IMAGE, "mask_image": MASK}),
    "flux image": (FLUX, d.FluxImg2ImgPipeline, {"image": IMAGE}),
    "flux inpaint": (FLUX, d.FluxInpaintPipeline, {"image": IMAGE, "mask_image": MASK}),
}


def build(family: Any, pipeline: Any) -> Callable[[], Any]:
    return lambda: pipeline(**family.build().components)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("sd3 image", "plain"), id="sd3 image, plain"),
        pytest.param(("sd3 inpaint", "fused"), id="sd3 inpaint, fused", marks=pytest.mark.exhaustive),
        pytest.param(("flux image", "fused"), id="flux image, fused", marks=pytest.mark.exhaustive),
        pytest.param(("flux inpaint", "plain"), id="flux inpaint, plain", marks=pytest.mark.exhaustive),
        pytest.param(("flux inpaint", "fused"), id="flux inpaint, fused"),
    ],
)
def way(request: pytest.FixtureRequest) -> tuple[Pair, dict[str, Any]]:
    name, lowering = request.param
    family, pipeline, extra = WAYS[name]
    made = pair(build(family, pipeline), lambda model: random_schedule(model, STEPS, seed=6), lowering)
    # a prompt of its own for either half of guidance: the truth knows streams by their prompts
    call = {name: 0.5 * value if name.startswith("negative") else value for name, value in family.guided.items()}
    return made, {**call, **extra}


@pytest.mark.parametrize(("strength", "first"), [(0.6, 4), (0.35, 6)])
def test_the_last_rows_of_the_schedule_are_used(way: tuple[Pair, dict[str, Any]], strength: float, first: int) -> None:
    made, call = way
    for _ in range(1 if made.lowering == "plain" else 2):  # the second run computes timestep work beforehand
        report = made.check({**call, "strength": strength}, first=first)
    assert set(report.last_catch_ups) == {first}
    assert "began at step" in str(report)


@pytest.fixture
def sd3() -> Any:
    pipeline = WAYS["sd3 image"][1](**SD3.build().components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CALL = {**SD3.guided, "image": IMAGE}


def test_a_schedule_may_be_for_the_steps_that_run() -> None:
    made = pair(build(*WAYS["sd3 image"][:2]), lambda model: random_schedule(model, 6, seed=6), "plain")
    report = made.check({**CALL, "strength": 0.6}, asked=10)
    assert report.last_catch_ups == ()
    assert report.last_cur == pytest.approx(made.schedule.cur)


def test_a_schedule_for_neither_number_of_steps_is_refused(sd3: Any) -> None:
    hrt.compile(sd3, Schedule.every(2, steps=8, sites=find_sites(sd3.transformer)), lowering="plain")
    with pytest.raises(ScheduleMismatchError, match=r"for 8 steps.*asked for 10 and runs the last 6.*one for 6"):
        sample(sd3, 10, strength=0.6, **CALL)


def test_every_step_that_runs_is_within_the_tolerance(sd3: Any) -> None:
    schedule = random_schedule(sd3.transformer, STEPS, seed=6)
    report = hrt.verify(sd3, schedule, lowering="fused", num_inference_steps=STEPS, strength=0.6, **CALL)
    assert [step.step for step in report.steps] == list(range(4, STEPS))
    assert report.ok


def test_a_sampler_with_two_evaluations_per_step_begins_at_the_right_row() -> None:
    def heun() -> Any:
        pipeline = build(*WAYS["sd3 image"][:2])()
        pipeline.scheduler = d.FlowMatchHeunDiscreteScheduler()
        return pipeline

    made = pair(heun, lambda model: random_schedule(model, 2 * STEPS - 1, seed=6), "plain")
    report = made.check({**CALL, "strength": 0.6}, asked=STEPS, first=8)
    assert report.last_calls == 2 * STEPS - 1 - 8


def test_runs_of_different_strengths_take_turns_with_whole_ones(sd3: Any) -> None:
    schedule = random_schedule(sd3.transformer, STEPS, seed=6)
    strengths = (0.6, 1.0, 0.3)
    hrt.reference(sd3, schedule)
    expected = [sample(sd3, STEPS, strength=strength, **CALL) for strength in strengths]
    hrt.compile(sd3, schedule, lowering="plain", strict=True, debug=True)
    got = [sample(sd3, STEPS, strength=strength, **CALL) for strength in strengths]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(hrt.get_compiled(sd3).report().plans) == 1


def test_a_loop_that_skips_steps_without_telling_its_scheduler_is_an_error(
    sd3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hrt.compile(sd3, random_schedule(sd3.transformer, STEPS), lowering="plain")
    monkeypatch.setattr(
        type(sd3), "get_timesteps", lambda self, steps, strength, device: (self.scheduler.timesteps[4:], steps - 4)
    )
    with pytest.raises(RunError, match=r"leaves steps out.*set_begin_index\(k\)"):
        sample(sd3, STEPS, strength=0.6, **CALL)
