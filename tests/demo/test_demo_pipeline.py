"""The bundled model and its schedule, from any folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import harmonica_rt as hrt


def test_the_demo_pipeline_draws_a_digit_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    pipeline, schedule = hrt.demo_pipeline(), hrt.demo_schedule()
    assert type(pipeline) is diffusers.DiTPipeline
    assert schedule.model == hrt.model_info(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=True)
    hrt.compile(pipeline, schedule, lowering="plain")
    (image,) = pipeline([3], num_inference_steps=schedule.steps, guidance_scale=schedule.guidance).images
    assert image.size == (64, 64)
    pixels = np.asarray(image)
    assert pixels.min() < 64
    assert pixels.max() > 192  # ink on paper, not grey noise
    assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)


def test_each_call_makes_a_new_pipeline() -> None:
    pytest.importorskip("diffusers")
    assert hrt.demo_pipeline().transformer is not hrt.demo_pipeline().transformer
