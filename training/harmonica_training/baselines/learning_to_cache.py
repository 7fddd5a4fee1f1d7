"""Learning-to-Cache (Ma et al., arXiv 2406.01733) as an objective, as its released code trains.

One of the steps that may reuse (every second one) is drawn uniformly, and images are noised to the step before it. That
step is computed and fills the caches; after one sampler step, the cached model is compared with the uncached one. So
the method needs images, and its loss shows neither how errors build up over a run nor what they do to the image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training.errors import TrainingError
from harmonica_training.harmonica import Objective
from harmonica_training.sdt import StepLosses, step_losses
from harmonica_training.setting import Setting


def learning_to_cache(latents: Tensor, *, pairs: int | None = None) -> Callable[[Setting], Objective]:
    """Make the objective for `train(..., objective=learning_to_cache(latents))`.

    Args:
        latents: `[N, ...]`, images as the pipeline's denoiser sees them without noise (encoded and scaled); entry i
            goes with entry i of the conditions.
        pairs: steps drawn per iteration; by default half as many as a run has, so that an iteration costs about as
            much as a run of the loop.
    """
    return lambda setting: LearningToCache(setting, latents, pairs)


class LearningToCache:
    """Errors of single cached steps on noised images."""

    method = "learning-to-cache"
    renewed = False

    def __init__(self, setting: Setting, latents: Tensor, pairs: int | None = None) -> None:
        if len(latents) != len(setting.conditions):
            raise TrainingError(
                f"expected a condition for each of the {len(latents)} images, got {len(setting.conditions)}"
            )
        if not hasattr(setting.loop.pipeline.scheduler, "add_noise"):
            name = type(setting.loop.pipeline.scheduler).__name__
            raise TrainingError(f"Learning-to-Cache noises images with its scheduler's add_noise, which {name} lacks")
        self._setting = setting
        self._latents = latents
        self.free = np.arange(setting.steps) % 2 == 1
        self.weights = torch.ones(setting.steps, dtype=torch.float64, device=setting.device)
        self._pairs = int(self.free.sum()) if pairs is None else pairs

    def losses(self, iteration: int, scores: Tensor, computes: NDArray[np.bool_], scale: float) -> StepLosses:
        """See `Objective.losses`; steps that were not drawn have no gradient."""
        steps = len(scores)
        drawn = np.random.default_rng([self._setting.config.seed, iteration]).choice(
            np.flatnonzero(self.free), size=self._pairs
        )
        by_score = torch.zeros_like(scores)
        mse, power = (torch.zeros(steps, dtype=torch.float64, device=scores.device) for _ in range(2))
        for place, step in enumerate(drawn.tolist()):
            pair = self._pair(iteration * self._pairs + place, step, scores, computes, scale)
            by_score[step] += pair.by_score[1]
            mse[step] += pair.mse[1]
            power[step] += pair.power[1]
        counts = torch.from_numpy(np.bincount(drawn, minlength=steps)).to(scores.device).clamp(min=1)
        chosen = np.isin(np.arange(steps), drawn)
        return StepLosses(by_score / counts[:, None], mse / counts, power / counts, chosen)

    def _pair(self, number: int, step: int, scores: Tensor, computes: NDArray[np.bool_], scale: float) -> StepLosses:
        """The losses of two steps: `step - 1`, which fills the caches, and `step`, which is cached."""
        setting, config = self._setting, self._setting.config
        entries = setting.entries(number)
        images = self._latents[entries].to(setting.device)
        generators = setting.generators(number)
        noises = [torch.randn(image.shape, generator=g) for image, g in zip(images, generators, strict=True)]
        scheduler = copy.deepcopy(setting.loop.pipeline.scheduler)
        scheduler.set_timesteps(config.steps)
        timesteps = scheduler.timesteps[step - 1].repeat(len(images)).to(setting.device)
        window = slice(step - 1, step + 1)
        return step_losses(
            setting.loop,
            setting.cached,
            setting.conditions.arguments(entries),
            generators,
            scores=scores[window],
            computes=computes[window],
            holds=config.cache_holds,
            precision=setting.precision,
            scale=scale,
            window=(step - 1, step + 1),
            start=scheduler.add_noise(images, torch.stack(noises).to(images), timesteps),
        )
