"""Collects what every training method needs of a pipeline: its sites, steps, costs and batches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from harmonica_rt.schedule import ModelInfo, SamplerInfo, Schedule
from harmonica_rt.schedule.sites import find_sites
from harmonica_training import distributed
from harmonica_training.cached_forward import CachedForward
from harmonica_training.conditions import Conditions, class_labels, draw
from harmonica_training.config import TrainConfig
from harmonica_training.costs import count_costs
from harmonica_training.denoising_loop import DenoisingLoop

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Setting:
    """A pipeline and the conditions that its schedule is trained on.

    Args:
        pipeline: a diffusers pipeline, on its device.
        config: how to train.
        conditions: what to generate; by default all class labels that the pipeline knows.

    Raises:
        TrainingError: the pipeline has no denoiser or no class labels, or the batch cannot be shared.
        SiteError: the denoiser has no sites.
    """

    def __init__(self, pipeline: Any, config: TrainConfig, conditions: Conditions | None = None) -> None:
        arguments = dict(config.arguments)
        if config.guidance is not None:
            arguments["guidance_scale"] = config.guidance
        self.config = config
        self.loop = DenoisingLoop(pipeline, steps=config.steps, arguments=arguments)
        self.model = self.loop.denoiser
        self.conditions = class_labels(pipeline) if conditions is None else conditions
        self.sites = find_sites(self.model, config.patterns)
        self.cached = CachedForward(self.model, self.sites, checkpointing=config.checkpointing)
        self.device = next(self.model.parameters()).device
        self.samples = distributed.share(config.batch)
        first = self.conditions.arguments(draw(self.conditions, config.seed, 0, [0]))
        self.timesteps, self.costs = self.loop.probe(
            first, noise(config.seed, 0, [0]), lambda call: count_costs(self.model, self.sites, call.forward)
        )
        self.steps = len(self.timesteps)

    def entries(self, iteration: int) -> list[int]:
        """The indices of the conditions of this process's samples in an iteration."""
        return draw(self.conditions, self.config.seed, iteration, self.samples)

    def inputs(self, iteration: int) -> dict[str, Any]:
        """The conditions of this process's samples, as arguments of the pipeline's call."""
        return self.conditions.arguments(self.entries(iteration))

    def generators(self, iteration: int) -> list[torch.Generator]:
        """The noise generators of these samples; the same each time."""
        return noise(self.config.seed, iteration, self.samples)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """A context for forwards in the configured precision."""
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.config.precision])

    def describe(self, schedule: Schedule) -> Schedule:
        """`schedule` with the model, sampler, timesteps and guidance that it was made for."""
        return schedule.with_provenance(
            model=ModelInfo.of(self.model),
            sampler=SamplerInfo.of(self.loop.pipeline.scheduler),
            timesteps=self.timesteps,
            guidance=self.config.guidance,
        )


def noise(seed: int, iteration: int, samples: Sequence[int]) -> list[torch.Generator]:
    """One generator per sample, seeded by its index in the whole batch, so that splitting the batch changes nothing."""
    generators = []
    for sample in samples:
        state = np.random.SeedSequence([seed, iteration, sample]).generate_state(1, np.uint64)
        generators.append(torch.Generator().manual_seed(int(state[0] >> 1)))
    return generators
