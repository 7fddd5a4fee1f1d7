"""Step-wise denoising training (SDT), arXiv 2410.01723, section 4.1.

One iteration starts from noise and goes through all steps, like a run. At each step the uncached model gives the
target, the cached model is compared with it at the same latents, and the cached prediction is passed to the
scheduler. So training sees what will run, drift included, and needs no images.

Losses of different steps share only the caches, which carry no gradient. So each step's gradient is taken
immediately, and the activations of at most one step are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training.cached_forward import Cache, CachedForward, CacheHolds, detached, first_tensor
from harmonica_training.denoising_loop import DenoiserCall, DenoisingLoop, StreamKey
from harmonica_training.errors import TrainingError

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class StepLosses:
    """The result of one iteration of SDT.

    Attributes:
        by_score: `[steps, sites]`, gradient of `sum_t mse_t` w.r.t. the scores (row t depends only on mse_t).
        mse: `[steps]`, squared error of the cached prediction, mean over its elements.
        power: `[steps]`, mean square of the target.
        drawn: bool `[steps]`, the steps that took part.
    """

    by_score: Tensor
    mse: Tensor
    power: Tensor
    drawn: NDArray[np.bool_]


def step_losses(
    loop: DenoisingLoop,
    cached: CachedForward,
    inputs: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    *,
    scores: Tensor,
    computes: NDArray[np.bool_],
    holds: CacheHolds,
    precision: Precision,
    scale: float = 1.0,
    window: tuple[int, int] | None = None,
    start: Tensor | None = None,
) -> StepLosses:
    """Run the loop for one batch and differentiate the loss of every step.

    Args:
        loop: runs the pipeline's denoising loop.
        cached: runs its denoiser with caching.
        inputs: conditions of the B samples.
        generators: B generators of noise.
        scores: r, `[steps, sites]`.
        computes: bool `[steps, sites]`, r > tau.
        holds: see `CachedForward.blend`.
        precision: makes a context for forwards (autocast, or nothing).
        scale: factor on the loss, applied before the gradient is taken and divided out afterwards, so that the
            gradient does not underflow in half precision.
        window, start: see `DenoisingLoop.run`; by default a whole run from noise.

    Raises:
        TrainingError: the run has more steps than the scores, or no site reaches the prediction.
    """
    leaf = scores.detach().clone().requires_grad_()
    caches: dict[StreamKey, Cache] = {}  # one per denoiser call of a step
    device = scores.device
    mse, power = (torch.zeros(len(scores), dtype=torch.float64, device=device) for _ in range(2))

    def denoise(call: DenoiserCall) -> Any:
        if call.step >= len(scores):
            raise TrainingError(f"expected a run of {len(scores)} steps, but it has more")
        with precision():
            if call.stream not in caches:  # the first step, or a later one if guidance starts late
                output, caches[call.stream] = cached.compute(call.forward)
                return output
            target = wide(first_tensor(call.forward()))
            with torch.enable_grad():
                row = leaf[call.step]
                output, caches[call.stream] = cached.blend(
                    call.forward, row, computes[call.step].tolist(), caches[call.stream], holds
                )
        prediction = first_tensor(output)
        with torch.enable_grad():
            if not prediction.requires_grad:
                raise TrainingError("no site reaches the denoiser's prediction; choose other sites")
            error = (wide(prediction) - target).square().mean() / len(caches)
            (error * scale).backward()
        mse[call.step] += error.detach()
        power[call.step] += target.square().mean() / len(caches)
        return detached(output)

    loop.run(inputs, generators, denoise, window=window, start=start)
    by_score = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / scale
    return StepLosses(by_score, mse, power, np.arange(len(scores)) > 0)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: squares in half precision lose too much."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
