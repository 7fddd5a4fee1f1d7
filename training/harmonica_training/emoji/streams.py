"""Random numbers that depend on seed, use and step alone, so that a resumed run draws what it would have drawn."""

import enum

import numpy as np
import torch
from torch import Tensor


class Use(enum.IntEnum):
    """What random numbers are for: no use sees those of another."""

    AUTOENCODER = 0
    CLASSIFIER = 1
    DENOISER = 2
    HELD_OUT = 3
    PROMPTS = 4


def stream(seed: int, use: Use, step: int = 0) -> np.random.Generator:
    """A generator of its own for each seed, use and step."""
    return np.random.default_rng((seed, int(use), step))


def noise(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Normal float32 numbers."""
    return torch.from_numpy(rng.standard_normal(shape, np.float32))
