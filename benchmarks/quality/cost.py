"""The theoretical cost of a schedule, as training counts it; tests compare it with the runtime's plan."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from harmonica_rt import find_sites
from harmonica_training.costs import SiteCosts, count_costs


@functools.lru_cache(maxsize=1)
def costs_of(model: nn.Module) -> SiteCosts:
    """FLOPs of a DiT and of its sites; the result for the last model is kept."""
    config: Any = model.config
    device = next(model.parameters()).device
    latents = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size, device=device)
    long = torch.zeros(2, dtype=torch.int64, device=device)
    with torch.no_grad():
        return count_costs(model, find_sites(model), lambda: model(latents, timestep=long, class_labels=long))
