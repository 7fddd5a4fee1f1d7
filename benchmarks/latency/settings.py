"""The options of the latency benchmark: what to measure, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.latency.providers import PROVIDERS
from benchmarks.latency.providers.base import Provider


@dataclass(frozen=True)
class Selection:
    """What to measure.

    Attributes:
        models: names of geometries.
        images: batches, in images.
        schedules: names of schedules; a model is measured only under those that fit it.
        providers: names of providers; `eager` is always included.
        flux_blocks: number of double-stream and of single-stream blocks of Flux.
    """

    models: tuple[str, ...]
    images: tuple[int, ...]
    schedules: tuple[str, ...]
    providers: tuple[str, ...]
    flux_blocks: tuple[int, int] = (19, 38)

    @property
    def chosen(self) -> dict[str, Provider]:
        """The providers, in the order of PROVIDERS."""
        return {name: PROVIDERS[name] for name in PROVIDERS if name == "eager" or name in self.providers}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        steps: steps per run.
        repeats: timed runs of each provider.
        device: device of model and calls.
        dtype: dtype of the parameters and of floating-point arguments.
        alone: also measure compile time and memory, with each provider in its own process.
        floor: also time the products of each step alone.
    """

    steps: int
    repeats: int
    device: torch.device
    dtype: torch.dtype
    alone: bool = False
    floor: bool = False
