"""The image error of a schedule: by its definition, and of the schedule that a training settles on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_training import train
from harmonica_training.setting import Setting
from harmonica_training.validation import APART, Validation
from harmonica_training.walk import Walker
from tests.training.test_trainer import config, dit


def test_image_error_is_that_of_the_runtime() -> None:
    pipeline = dit()
    setting = Setting(pipeline, config())
    mask = np.random.default_rng(0).random((8, len(setting.sites))) < 0.6
    mask[0] = True
    found = Validation(setting).image_error(mask)

    def latents() -> torch.Tensor:
        walker = Walker(pipeline, steps=8, arguments={"guidance_scale": 1.0})
        return walker.walk(setting.inputs(APART), setting.generators(APART), lambda call: call.forward()).double()

    plain = latents()
    truth = hrt.reference(copy.deepcopy(pipeline.transformer), hrt.Schedule.from_array(mask, setting.sites))
    pipeline.transformer.forward = truth
    expected = float((latents() - plain).square().mean())
    del pipeline.transformer.forward
    assert found == pytest.approx(expected, rel=1e-6)
    assert Validation(setting).image_error(np.ones_like(mask)) == 0.0


def test_a_training_settles_on_the_best_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, bytes]] = []
    measure = Validation.image_error

    def watched(self: Validation, computes: np.ndarray) -> float:  # type: ignore[type-arg]
        error = measure(self, computes)
        seen.append((error, computes.tobytes()))
        return error

    monkeypatch.setattr(Validation, "image_error", watched)
    schedule = train(dit(), config(iterations=10)).schedule
    assert len(seen) == 5
    best, mask = min(seen)
    assert schedule.compute.tobytes() == mask
    assert schedule.made_by is not None
    assert schedule.made_by.hyper_parameters["image_error"] == "sensitivity"
    assert schedule.made_by.hyper_parameters["validated_error"] == best
