"""IP-Adapter: images as prompts, which the transformer itself projects, with weights in its attention processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.pipelines_in_use.small import FLUX, SD3, change
from tests.tiny import random_schedule, randomised, sample
from tests.truth import Pair, pair

STEPS = 5


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbered(modules: list[Any]) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": value for i, module in enumerate(modules) for name, value in module.state_dict().items()}


# for the negative prompt, whether or not there is one: the pipeline would encode a black image
NO_IMAGE = {"negative_ip_adapter_image_embeds": [image(3, 1, 1, 6)]}


def load_into_sd3(pipeline: Any) -> None:
    """Its projection sees the timestep."""
    torch.manual_seed(5)
    projection = IPAdapterTimeImageProjection(
        embed_dim=12, output_dim=16, hidden_dim=16, heads=1, num_queries=4, timestep_in_dim=32
    )
    model = pipeline.transformer
    processors = [
        SD3IPAdapterJointAttnProcessor2_0(hidden_size=16, ip_hidden_states_dim=16, head_dim=8, timesteps_emb_dim=16)
        for _ in model.attn_processors
    ]
    state = {
        "image_proj": randomised(projection).state_dict(),
        "ip_adapter": numbered([randomised(processor) for processor in processors]),
    }
    model._load_ip_adapter_weights(state)


def load_into_flux(pipeline: Any) -> None:
    torch.manual_seed(5)
    model = pipeline.transformer
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=4)
    processors = [FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=12) for _ in model.transformer_blocks]
    attention = numbered([randomised(processor) for processor in processors])
    state = {
        "image_proj": {
            name.replace("image_embeds", "proj"): value for name, value in randomised(projection).state_dict().items()
        },
        "ip_adapter": {name.replace("ip.0.", "ip."): value for name, value in attention.items()},
    }
    model._load_ip_adapter_weights([state])


WAYS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "sd3": (
        SD3,
        load_into_sd3,
        {**SD3.guided, "ip_adapter_image_embeds": image(1, 2, 3, 12)},
        {**SD3.guided, "ip_adapter_image_embeds": image(2, 2, 3, 12)},
    ),
    "flux": (
        FLUX,
        load_into_flux,
        {**FLUX.unguided, **NO_IMAGE, "ip_adapter_image_embeds": [image(1, 1, 1, 6)]},
        {**FLUX.unguided, **NO_IMAGE, "ip_adapter_image_embeds": [image(2, 1, 1, 6)]},
    ),
}


def schedule_of(name: str) -> Schedule:
    """For the model as it is without an adapter, as schedules are made."""
    return random_schedule(WAYS[name][0].build().transformer, STEPS, seed=9)


def loaded(name: str, lowering: str) -> Pair:
    family, load = WAYS[name][:2]

    def build() -> Any:
        pipeline = family.build()
        load(pipeline)
        return pipeline

    return pair(build, lambda _: schedule_of(name), lowering)


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("sd3", "fused"),
        ("flux", "plain"),
        pytest.param("sd3", "plain", marks=pytest.mark.exhaustive),
        pytest.param("flux", "fused", marks=pytest.mark.exhaustive),
    ],
)
def test_images_as_prompts_equal_the_truth(name: str, lowering: str) -> None:
    made = loaded(name, lowering)
    first, second = WAYS[name][2:]
    images = []
    for call in (first, second):
        report = made.check(call)
        images.append(sample(made.compiled, STEPS, **call))
    assert report.last_catch_ups == ()
    assert len(report.plans) == 1
    assert not made.same(*images)


@pytest.mark.parametrize("name", ["flux", pytest.param("sd3", marks=pytest.mark.exhaustive)])
def test_an_adapter_scaled_or_removed_after_compiling_makes_a_new_plan(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, call = loaded(name, "plain"), WAYS[name][2]
    before = made.run(call)[2]
    change(made, lambda pipeline: pipeline.set_ip_adapter_scale(0.3))
    made.check(call)
    assert not made.same(made.run(call)[2], before)
    assert any(".scale" in line and "captured again" in line for line in caplog.messages)
    caplog.clear()
    change(made, lambda pipeline: pipeline.unload_ip_adapter())
    made.check({name: value for name, value in call.items() if "ip_adapter" not in name})
    assert any("captured again" in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["sd3", pytest.param("flux", marks=pytest.mark.exhaustive)])
def test_an_adapter_loaded_after_compiling_makes_a_new_plan(name: str, caplog: pytest.LogCaptureFixture) -> None:
    family, load, call, _ = WAYS[name]
    made = pair(family.build, lambda _: schedule_of(name), "plain")
    made.check({name: value for name, value in call.items() if "ip_adapter" not in name})
    change(made, load)
    made.check(call)
    assert any("captured again" in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["flux", pytest.param("sd3", marks=pytest.mark.exhaustive)])
def test_every_step_is_within_the_tolerance(name: str) -> None:
    family, load, call, _ = WAYS[name]
    torch.manual_seed(0)
    pipeline = family.build()
    load(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    report = hrt.verify(pipeline, schedule_of(name), lowering="fused", num_inference_steps=STEPS, **call)
    assert report.ok
    assert len(report.steps) == STEPS


def test_guidance_with_an_image_on_either_side_equals_the_truth() -> None:
    made = loaded("flux", "plain")
    negative = {name: value * 0.5 for name, value in FLUX.guided.items() if name.startswith("negative")}
    report = made.check({**WAYS["flux"][2], **negative, "true_cfg_scale": 2.0})
    assert report.last_calls == 2 * STEPS
    assert report.last_catch_ups == ()
