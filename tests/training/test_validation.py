"""The image error of a schedule, by its definition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_training.denoising_loop import DenoisingLoop
from harmonica_training.setting import Setting
from harmonica_training.validation import APART, Validation
from tests.training.small import config, dit


def test_image_error_is_that_of_the_runtime() -> None:
    pipeline = dit()
    setting = Setting(pipeline, config(validation_batches=2))
    mask = np.random.default_rng(0).random((8, len(setting.sites))) < 0.6
    mask[0] = True
    found = Validation(setting).image_error(mask)

    def latents(batch: int) -> torch.Tensor:
        loop = DenoisingLoop(pipeline, steps=8, arguments={"guidance_scale": 1.0})
        return loop.run(setting.inputs(batch), setting.generators(batch), lambda call: call.forward()).double()

    batches = (APART, APART + 1)
    plain = torch.cat([latents(batch) for batch in batches])
    truth = hrt.reference(copy.deepcopy(pipeline.transformer), hrt.Schedule.from_array(mask, setting.sites))
    pipeline.transformer.forward = lambda *args, **kwargs: truth(*args, **kwargs)
    cached = []
    for batch in batches:
        truth.reset()
        cached.append(latents(batch))
    del pipeline.transformer.forward
    errors = (torch.cat(cached) - plain).square().flatten(1).mean(dim=1).numpy()
    assert len(errors) == 4
    expected = float(np.prod(errors) ** 0.25)
    assert found == pytest.approx(expected, rel=1e-6)
    assert Validation(setting).image_error(np.ones_like(mask)) < 1e-19
