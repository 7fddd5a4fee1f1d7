"""The model without a cache: eager, and compiled by torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import Role, Runner


@dataclass(frozen=True)
class Eager:
    """The model as it is; what all speed-ups are against."""

    name: str = "eager"
    role: Role = "uncached"

    def applies(self, task: Task) -> str | None:
        """Always."""
        return None

    def prepare(self, task: Task) -> Runner:
        """The model."""
        return Runner(task, task.case.tree())


@dataclass(frozen=True)
class Compiled:
    """torch.compile without a cache."""

    name: str
    mode: str | None
    role: Role = "uncached"

    def applies(self, task: Task) -> str | None:
        """reduce-overhead is about CUDA graphs."""
        if self.mode == "reduce-overhead" and task.case.device.type != "cuda":
            return "its CUDA graphs need CUDA"
        return None

    def prepare(self, task: Task) -> Runner:
        """The compiled model."""
        return CompiledRunner(task, torch.compile(task.case.tree(), mode=self.mode, fullgraph=True, dynamic=False))


class CompiledRunner(Runner):
    """Tells CUDA graphs where a step begins: the output of the step before is then free to be overwritten."""

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(index)
