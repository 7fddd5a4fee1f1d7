"""A pipeline, a model and calls that fits take milliseconds for."""

from __future__ import annotations

import torch
from torch import nn

from harmonica_rt import Schedule, find_sites
from tests.models import stack_call
from tests.tiny import families

STEPS = 5
CALL = {"num_inference_steps": STEPS, **families()["dit"].guided}


def every(k: int, model: nn.Module) -> Schedule:
    """Every k-th step, for all sites of a model."""
    return Schedule.every(k, steps=STEPS, sites=find_sites(model))


def run_of(seed: int) -> list[dict[str, torch.Tensor]]:
    """The calls of a run of `stack`: latents that move by a fifth of a random vector per step."""
    generator = torch.Generator().manual_seed(seed)
    start, direction = torch.randn(2, 2, 4, 8, generator=generator)
    return [{**stack_call(step), "latents": start + 0.2 * step * direction} for step in range(STEPS)]
