"""Measures the error that a schedule causes in the final latents, on samples that no iteration draws.

A run under the schedule is compared with the uncached run, on the same samples each time; the training loss is a proxy
for this error. A few samples, whose image changes altogether, have errors many times those of the rest, and would
dominate a mean over few samples. So the geometric mean is used, which ranks schedules as a mean of PSNR values does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training import distributed
from harmonica_training.cached_forward import Cache
from harmonica_training.denoising_loop import DenoiserCall, StreamKey
from harmonica_training.setting import Setting

APART = 2**31  # offset of validation batches among iteration numbers: samples that no iteration draws
SMALLEST = 1e-20  # lower bound on errors, so that they have a logarithm


class Validation:
    """Image errors of schedules, on `validation_batches` batches.

    Args:
        setting: the pipeline with its conditions.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._batches = [APART + batch for batch in range(setting.config.validation_batches)]
        self._uncached: list[Tensor] = []

    def logs(self, computes: NDArray[np.bool_]) -> Iterator[float]:
        """Logarithm of each batch's image error under `computes`, bool `[steps, sites]`; batches are run lazily."""
        if not self._uncached:
            self._uncached = [self._latents(batch, np.ones_like(computes)) for batch in self._batches]
        for batch, uncached in zip(self._batches, self._uncached, strict=True):
            difference = self._latents(batch, computes).double() - uncached.double()
            errors = difference.square().flatten(1).mean(dim=1)
            yield float(distributed.mean(errors.clamp(min=SMALLEST).log().mean()))

    def image_error(self, computes: NDArray[np.bool_]) -> float:
        """Squared error of the final latents under `computes`, bool `[steps, sites]`: geometric mean over samples."""
        return math.exp(statistics.fmean(self.logs(computes)))

    def _latents(self, batch: int, computes: NDArray[np.bool_]) -> Tensor:
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
            return setting.loop.run(setting.inputs(batch), setting.generators(batch), denoise)
