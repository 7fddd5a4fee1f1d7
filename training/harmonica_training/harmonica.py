"""HarmoniCa (arXiv 2410.01723) as an objective: SDT with each step's error weighted by IEPO's lambda."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training import distributed
from harmonica_training.iepo import ImageErrors
from harmonica_training.sdt import StepLosses, step_losses
from harmonica_training.setting import Setting


class Objective(Protocol):
    """A way to measure what reusing each site at each step costs.

    Attributes:
        method: the method's name in the schedules it makes.
        free: bool `[steps]`, the steps that may reuse.
        weights: `[steps]`, lambda.
        renewed: whether the last call of `losses` computed a new lambda.
    """

    method: str
    free: NDArray[np.bool_]
    weights: Tensor
    renewed: bool

    def losses(self, iteration: int, scores: Tensor, computes: NDArray[np.bool_], scale: float) -> StepLosses:
        """Errors and their gradients w.r.t. the scores, on this process's share of the iteration's batch."""


class HarmoniCa:
    """SDT with lambda renewed every C iterations, or with lambda = 1 if the config names no image error."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._config = setting.config
        self.method = "harmonica" if self._config.image_error else "sdt"
        self.free = np.arange(setting.steps) > 0
        self.weights = torch.ones(setting.steps, dtype=torch.float64, device=setting.device)
        self.renewed = False

    def losses(self, iteration: int, scores: Tensor, computes: NDArray[np.bool_], scale: float) -> StepLosses:
        """See `Objective.losses`."""
        setting, config = self._setting, self._config
        inputs = setting.inputs(iteration)
        losses = step_losses(
            setting.loop,
            setting.cached,
            inputs,
            setting.generators(iteration),
            scores=scores,
            computes=computes,
            holds=config.cache_holds,
            precision=setting.precision,
            scale=scale,
        )
        self.renewed = config.image_error is not None and iteration % config.renew_every == 0
        if self.renewed:
            errors = ImageErrors(
                setting.loop,
                setting.cached,
                scores,
                computes,
                inputs,
                lambda: setting.generators(iteration),
                holds=config.cache_holds,
                precision=setting.precision,
            )
            self._renew(
                distributed.mean(errors.weights(config.image_error)), distributed.mean(losses.mse), iteration == 0
            )
        return replace(losses, by_score=losses.by_score * self.weights[:, None].to(scores))

    def _renew(self, weights: Tensor, mse: Tensor, first: bool) -> None:
        """Set lambda from the image errors `weights` and the errors `mse` of the predictions, both `[steps]`."""
        if self._config.image_error != "sensitivity":
            self.weights = _mean_one(weights)
            return
        seen = mse > 0  # a step that computes everything has no error of either kind, and keeps its lambda
        found = torch.where(seen, weights / mse.clamp(min=torch.finfo(mse.dtype).tiny), 0.0)
        if first and bool(seen.any()):
            self.weights = torch.where(seen, found, found.sum() / seen.sum())
        else:  # lambda is a property of the sampler and changes little: average out the noise
            self.weights = torch.where(seen, (self.weights + found) / 2, self.weights)


def _mean_one(weights: Tensor) -> Tensor:
    """Weights scaled to a mean of 1 over all steps but the first, so that beta does not depend on the image size."""
    mean = weights[1:].mean()
    return torch.ones_like(weights) if mean == 0 else weights / mean
