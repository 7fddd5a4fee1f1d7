"""From a prompt in words, through a tokenizer and a text encoder, to images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import harmonica_rt as hrt
from tests.tiny import pixart_from_words, random_schedule, sample, saved_and_loaded

STEPS = 4
CALL = {"height": 8, "width": 8, "use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return saved_and_loaded(pixart_from_words, tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("guidance", [4.5, 1.0], ids=["guided", "unguided"])
def test_every_step_is_equal(pipeline: Any, guidance: float) -> None:
    report = hrt.verify(
        pipeline,
        random_schedule(pipeline.transformer, STEPS),
        lowering="plain",
        prompt="a small cat on the moon",
        negative_prompt="the moon",
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        **CALL,
    )
    assert len(report.steps) == STEPS
    assert all(step.same_bits for step in report.steps)
    assert report.trajectory_same_bits


def test_another_prompt_of_the_same_length_shares_the_plan_and_no_features(pipeline: Any) -> None:
    schedule, prompts = random_schedule(pipeline.transformer, STEPS), ["a small cat", "the small moon", "a small cat"]
    hrt.reference(pipeline, schedule)
    expected = [sample(pipeline, STEPS, prompt=prompt, **CALL) for prompt in prompts]
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = [sample(pipeline, STEPS, prompt=prompt, **CALL) for prompt in prompts]
    report = hrt.get_compiled(pipeline).report()
    hrt.uncompile(pipeline)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not np.array_equal(got[0], got[1])
    assert len(report.plans) == 1
    assert report.last_catch_ups == ()


def test_several_prompts_with_several_images_each_equal_the_reference(pipeline: Any) -> None:
    schedule = random_schedule(pipeline.transformer, STEPS)
    call = {"prompt": ["a cat", "the moon"], "num_images_per_prompt": 2, **CALL}
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **call)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = sample(pipeline, STEPS, **call)
    hrt.uncompile(pipeline)
    assert got.shape == (4, 8, 8, 3)
    assert np.array_equal(got, expected)
