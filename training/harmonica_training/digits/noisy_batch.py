"""A batch of noisy latents with the velocity to predict, and the gradients of one training step on it."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from harmonica_training.digits.config import NULL_CLASS


@dataclasses.dataclass(frozen=True)
class NoisyBatch:
    """What one training step learns from.

    Attributes:
        noisy, velocity: [B, 4, S, S], the noisy latents and the velocity to predict.
        timesteps, labels: int64 [B], some labels replaced by the null class.
    """

    noisy: Tensor
    velocity: Tensor
    timesteps: Tensor
    labels: Tensor

    def split(self, parts: int) -> list["NoisyBatch"]:
        """Up to `parts` batches of nearly equal size."""
        columns = [getattr(self, field.name).chunk(parts) for field in dataclasses.fields(self)]
        return [NoisyBatch(*row) for row in zip(*columns, strict=True)]


def noisy_batch(
    alphas_cumprod: Tensor, latents: Tensor, labels: Tensor, label_dropout: float, generator: torch.Generator
) -> NoisyBatch:
    """Draw timesteps, noise and dropped labels for clean latents [B, 4, S, S] with labels int64 [B].

    `alphas_cumprod` [1000] is the signal's share `a` of the variance at each training timestep: noisy is
    `sqrt(a) latents + sqrt(1 - a) noise`, velocity is `sqrt(a) noise - sqrt(1 - a) latents`.
    """
    count = len(latents)
    # stratified timesteps: one from each of B equal bins, which lowers the variance of the loss
    bins = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    timesteps = (bins * (len(alphas_cumprod) / count)).long().clamp(max=len(alphas_cumprod) - 1)
    noise = torch.randn(latents.shape, generator=generator)
    share = alphas_cumprod[timesteps][:, None, None, None]
    dropped = torch.rand(count, generator=generator) < label_dropout
    return NoisyBatch(
        noisy=share.sqrt() * latents + (1.0 - share).sqrt() * noise,
        velocity=share.sqrt() * noise - (1.0 - share).sqrt() * latents,
        timesteps=timesteps,
        labels=labels.masked_fill(dropped, NULL_CLASS),
    )


def backward(model: DiTTransformer2DModel, batch: NoisyBatch, pool: ThreadPoolExecutor, workers: int) -> float:
    """Set the gradients of the mean squared error and return it; each worker takes a part of the batch.

    Threads inside an operator would wait for each other at its end: on two cores shared with a busy process, a step
    took about 3 s that way, and takes 0.65 s this way, with one thread in the optimiser too.
    """
    parameters = list(model.parameters())

    def part_gradients(part: NoisyBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        predicted = model(part.noisy, timestep=part.timesteps, class_labels=part.labels).sample
        error = (predicted - part.velocity).square().sum() / batch.velocity.numel()
        return error.detach(), torch.autograd.grad(error, parameters)

    results = list(pool.map(part_gradients, batch.split(workers)))
    for parameter, *gradients in zip(parameters, *(result[1] for result in results), strict=True):
        parameter.grad = torch.stack(gradients).sum(dim=0) if len(gradients) > 1 else gradients[0]
    return sum(float(result[0]) for result in results)
