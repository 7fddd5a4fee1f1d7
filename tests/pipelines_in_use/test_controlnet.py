"""ControlNet: residuals are new in every step, zero or absent in some, and are no sign of another request."""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

from harmonica_rt import Schedule
from tests.tiny import families, random_schedule, randomised, sample
from tests.truth import Pair, pair

# the tiny Flux ControlNet builds it under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*`FluxPosEmbed` is deprecated:FutureWarning")

STEPS = 6
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SD3, FLUX = families()["sd3"], families()["flux"]


def sd3() -> Any:
    controlnet = d.SD3ControlNetModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=16,
    )
    return d.StableDiffusion3ControlNetPipeline(**SD3.build().components, controlnet=randomised(controlnet))


def flux() -> Any:
    controlnet = d.FluxControlNetModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return d.FluxControlNetPipeline(**FLUX.build().components, controlnet=randomised(controlnet))


WAYS = {"sd3": (sd3, SD3.guided), "flux": (flux, FLUX.unguided)}


def schedule_for(model: Any) -> Schedule:
    return random_schedule(model, STEPS, seed=8)


@pytest.fixture(
    scope="module",
    params=[("sd3", "plain"), ("sd3", "fused"), ("flux", "plain"), ("flux", "fused")],
    ids=" ".join,
)
def way(request: pytest.FixtureRequest) -> tuple[Pair, dict[str, Any]]:
    name, lowering = request.param
    build, call = WAYS[name]
    return pair(build, schedule_for, lowering), {**call, "control_image": IMAGE, "controlnet_conditioning_scale": 1.0}


@pytest.mark.parametrize("spans", [(0.0, 1.0), (0.5, 0.8)], ids=["all steps", "some"])
def test_residuals_belong_to_the_steps(way: tuple[Pair, dict[str, Any]], spans: tuple[float, float]) -> None:
    """Before and after its span the pipeline passes zeros: the same values in one step after the other."""
    made, call = way
    start, end = spans
    report = made.check({**call, "control_guidance_start": start, "control_guidance_end": end})
    assert report.last_catch_ups == ()
    assert report.last_cur == pytest.approx(made.schedule.cur)
    assert len(report.plans) == 1


def test_the_residuals_matter(way: tuple[Pair, dict[str, Any]]) -> None:
    made, call = way
    images = [sample(made.compiled, STEPS, **{**call, "controlnet_conditioning_scale": scale}) for scale in (1.0, 0.0)]
    assert not np.allclose(*images, atol=1e-4)


@pytest.mark.parametrize("name", WAYS)
def test_no_residuals_in_some_steps(name: str) -> None:
    """A call without them is another program, so the steps where they come and go are computed in full."""
    build, call = WAYS[name]

    def without(self: Any, args: Any, kwargs: dict[str, Any], output: tuple[Any, ...]) -> Any:
        return output if kwargs["conditioning_scale"] else (None,) * len(output)

    made = pair(build, lambda model: Schedule.every(3, steps=STEPS, sites=schedule_for(model).sites), "plain")
    for pipeline in (made.plain, made.compiled):
        pipeline.controlnet.register_forward_hook(without, with_kwargs=True)
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
