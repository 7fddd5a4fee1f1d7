"""Which of the schedules that a training passes through is best: the error of the final latents, on a batch apart.

The loss is a proxy, estimated anew from other noise in each iteration, and a schedule changes in jumps. What it stands
for can be measured at little cost: a run under the schedule, on the same samples each time, against the uncached run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training import distributed
from harmonica_training.cached_forward import Cache
from harmonica_training.setting import Setting
from harmonica_training.walk import DenoiserCall, StreamKey

APART = 2**31  # added to a number of iterations: samples that no iteration draws


class Validation:
    """Image errors of schedules on one batch.

    Args:
        setting: the pipeline with its conditions.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._uncached: Tensor | None = None

    def image_error(self, computes: NDArray[np.bool_]) -> float:
        """Mean squared error of the final latents under bool `[steps, sites]`, over all processes."""
        if self._uncached is None:
            self._uncached = self._latents(np.ones_like(computes))
        error = (self._latents(computes).double() - self._uncached.double()).square().mean()
        return float(distributed.mean(error))

    def _latents(self, computes: NDArray[np.bool_]) -> Tensor:
        setting = self._setting
        caches: dict[StreamKey, Cache] = {}

        def denoise(call: DenoiserCall) -> Any:
            with setting.precision():
                if call.stream not in caches:
                    output, caches[call.stream] = setting.cached.compute(call.forward)
                else:
                    row = computes[call.step].tolist()
                    output, caches[call.stream] = setting.cached.reuse(call.forward, row, caches[call.stream])
            return output

        with torch.no_grad():
            return setting.walker.walk(setting.inputs(APART), setting.generators(APART), denoise)
