"""Learning-to-Cache as an objective: the pairs it draws, the gradients it takes, the steps it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harmonica_training import ClassLabels, TrainConfig, TrainingError, train
from harmonica_training.baselines import learning_to_cache
from harmonica_training.baselines.learning_to_cache import LearningToCache
from harmonica_training.cached_forward import frozen
from harmonica_training.setting import Setting
from tests.training.small import PAPER, dit

LATENTS = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = ClassLabels([0, 1, 2, 3, 4, 5])


def config(**options: object) -> TrainConfig:
    given: dict[str, object] = {
        "steps": 8,
        "target_cur": 0.3,
        "guidance": 1.0,
        "iterations": 8,
        "batch": 2,
        "learning_rate": 0.3,
        **PAPER,
    }
    return TrainConfig(**{**given, **options})  # type: ignore[arg-type]


def test_every_second_step_reuses() -> None:
    result = train(dit(layers=3), config(), conditions=LABELS, objective=learning_to_cache(LATENTS))
    assert result.schedule.compute[0::2].all()
    assert result.schedule.cur == pytest.approx(0.3, abs=1 / result.scores.size)
    assert result.schedule.made_by is not None
    assert result.schedule.made_by.method == "learning-to-cache"
    assert [row is None for row in result.schedule.made_by.scores or ()] == [True, False] * 4
    with pytest.raises(TrainingError, match=r"with everything reused where it can be, it is 0\.5"):
        train(dit(layers=3), config(target_cur=0.6), conditions=LABELS, objective=learning_to_cache(LATENTS))


def test_the_error_of_a_pair_follows_its_definition() -> None:
    """The error of a step is that of reusing what the step before computed, on a noised image, one sampler step on."""
    setting = Setting(dit(), config(batch=1), LABELS)
    objective = LearningToCache(setting, LATENTS, pairs=1)
    scores = torch.zeros(8, len(setting.sites))
    scores[0::2] = 1.0
    with frozen(setting.model):
        losses = objective.losses(0, scores, (scores > 0.1).numpy(), 1.0)
        (step,) = np.flatnonzero(losses.drawn)
        assert step % 2 == 1
        assert (losses.mse > 0).nonzero().flatten().tolist() == [step]
        assert losses.by_score.any(dim=1).nonzero().flatten().tolist() == [step]

        (entry,) = setting.entries(0)
        scheduler = setting.loop.pipeline.scheduler
        scheduler.set_timesteps(8)
        before, now = scheduler.timesteps[step - 1], scheduler.timesteps[step]
        noise = torch.randn(4, 4, 4, generator=setting.generators(0)[0])[None]
        x = scheduler.add_noise(LATENTS[entry : entry + 1], noise, before[None])
        model, label = setting.model, torch.tensor([entry])
        with torch.no_grad():
            first, cache = setting.cached.compute(lambda: model(x, timestep=before[None], class_labels=label))
            x = scheduler.step(first.sample, before, x).prev_sample
            target = model(x, timestep=now[None], class_labels=label).sample
            reused, _ = setting.cached.reuse(
                lambda: model(x, timestep=now[None], class_labels=label), [False] * len(setting.sites), cache
            )
        expected = (reused.sample - target).square().mean().double()
    torch.testing.assert_close(losses.mse[step], expected, rtol=1e-4, atol=1e-10)


def test_a_number_of_images_other_than_of_conditions_is_refused() -> None:
    with pytest.raises(TrainingError, match="a condition for each of the 6 images, got 10"):
        train(dit(), config(), objective=learning_to_cache(LATENTS))
