"""ControlNet: residuals are new in every step, zero or absent in some, and are no sign of another request."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

from harmonica_rt import Schedule
from tests.pipelines_in_use.small import FLUX, SD3, change
from tests.tiny import Family, random_schedule, randomised, sample
from tests.truth import Pair, pair

# the tiny Flux ControlNet builds it under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning")

STEPS = 6
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def with_controlnet(family: Family, controlnet: type, pipeline: type) -> Any:
    """A pipeline with a ControlNet of the widths and depth of its transformer."""
    parts = family.build().components
    fields = inspect.signature(controlnet).parameters
    config = {name: value for name, value in parts["transformer"].config.items() if name in fields}
    return pipeline(**parts, controlnet=randomised(controlnet(**config)))


def sd3() -> Any:
    return with_controlnet(SD3, d.SD3ControlNetModel, d.StableDiffusion3ControlNetPipeline)


def flux() -> Any:
    return with_controlnet(FLUX, d.FluxControlNetModel, d.FluxControlNetPipeline)


WAYS = {"sd3": (sd3, SD3.guided), "flux": (flux, FLUX.unguided)}


def schedule_for(model: Any) -> Schedule:
    return random_schedule(model, STEPS, seed=8)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("sd3", "plain"), id="sd3 plain", marks=pytest.mark.exhaustive),
        pytest.param(("sd3", "fused"), id="sd3 fused"),
        pytest.param(("flux", "plain"), id="flux plain"),
        pytest.param(("flux", "fused"), id="flux fused", marks=pytest.mark.exhaustive),
    ],
)
def way(request: pytest.FixtureRequest) -> tuple[Pair, dict[str, Any]]:
    name, lowering = request.param
    build, call = WAYS[name]
    return pair(build, schedule_for, lowering), {**call, "control_image": IMAGE, "controlnet_conditioning_scale": 1.0}


@pytest.mark.parametrize("spans", [(0.0, 1.0), (0.5, 0.8)], ids=["all steps", "some"])
def test_the_residuals_of_each_step_are_used(way: tuple[Pair, dict[str, Any]], spans: tuple[float, float]) -> None:
    """Before and after its span the pipeline passes zeros: the same values in one step after the other."""
    made, call = way
    start, end = spans
    report = made.check({**call, "control_guidance_start": start, "control_guidance_end": end})
    assert report.last_catch_ups == ()
    assert report.last_cur == pytest.approx(made.schedule.cur)
    assert len(report.plans) == 1


def test_residuals_change_the_image(way: tuple[Pair, dict[str, Any]]) -> None:
    made, call = way
    images = [sample(made.compiled, STEPS, **{**call, "controlnet_conditioning_scale": scale}) for scale in (1.0, 0.0)]
    assert not np.allclose(*images, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", pytest.param("flux", marks=pytest.mark.exhaustive)])
def test_steps_where_residuals_come_or_go_are_computed_in_full(name: str) -> None:
    """A call without them is another program, so the steps where they come and go are computed in full."""
    build, call = WAYS[name]

    def without(self: Any, args: Any, kwargs: dict[str, Any], output: tuple[Any, ...]) -> Any:
        return output if kwargs["conditioning_scale"] else (None,) * len(output)

    made = pair(build, lambda model: Schedule.every(3, steps=STEPS, sites=schedule_for(model).sites), "plain")
    change(made, lambda pipeline: pipeline.controlnet.register_forward_hook(without, with_kwargs=True))
    report = made.check(
        {
            **call,
            "control_image": IMAGE,
            "controlnet_conditioning_scale": 1.0,
            "control_guidance_start": 0.3,
            "control_guidance_end": 0.7,
        }
    )
    assert len(report.plans) == 2
    assert report.last_catch_ups
