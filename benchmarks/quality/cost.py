"""What a schedule costs in theory: FLOPs of the step programs that the runtime would make of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from harmonica_rt import Schedule, find_sites
from harmonica_rt.capture.call import CallConvention
from harmonica_rt.capture.graph import CapturedGraph, capture
from harmonica_rt.passes import flops
from harmonica_rt.passes.specialise import Pattern, specialise
from harmonica_rt.plan.liveness import analyse


class Costs:
    """Theoretical speed-ups of one DiT, captured once."""

    def __init__(self, model: nn.Module) -> None:
        self._captured = _captured(model)
        self._nodes = flops.count_nodes(self._captured.graph)
        self._patterns: dict[Pattern, int] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """The model's sites in execution order."""
        return self._captured.sites

    def speedup(self, schedule: Schedule) -> float:
        """FLOPs of as many uncached steps / FLOPs of the schedule's steps."""
        patterns, _ = analyse(self._captured, schedule.compute)
        return sum(self._nodes.values()) * schedule.steps / sum(map(self._left, patterns))

    def _left(self, pattern: Pattern) -> int:
        if pattern not in self._patterns:
            self._patterns[pattern] = flops.total(specialise(self._captured, pattern).graph, self._nodes)
        return self._patterns[pattern]


@functools.lru_cache(maxsize=1)
def costs_of(model: nn.Module) -> Costs:
    """The costs of a model; those of the last one are kept."""
    return Costs(model)


def _captured(model: nn.Module) -> CapturedGraph:
    config: Any = model.config
    latents = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size)
    long = torch.zeros(2, dtype=torch.int64)
    call = CallConvention(model).normalise((latents,), {"timestep": long, "class_labels": long})
    return capture(model, call, find_sites(model))
