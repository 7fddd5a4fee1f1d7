"""The model without a cache: eager, and compiled by torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import Role, Runner


@dataclass(frozen=True)
class Eager:
    """The model itself, the baseline of all speed-ups."""

    name: str = "eager"
    role: Role = "uncached"

    def applies(self, task: Task) -> str | None:
        """None: it applies to every task."""
        return None

    def prepare(self, task: Task) -> Runner:
        """The uncached model."""
        return Runner(task, task.case.tree())


@dataclass(frozen=True)
class Compiled:
    """torch.compile without a cache."""

    name: str
    mode: str | None
    role: Role = "uncached"

    def applies(self, task: Task) -> str | None:
        """None, unless the mode needs CUDA graphs and there is no GPU."""
        if self.mode == "reduce-overhead" and task.case.device.type != "cuda":
            return "its CUDA graphs need CUDA"
        return None

    def prepare(self, task: Task) -> Runner:
        """The compiled model."""
        return CompiledRunner(task, torch.compile(task.case.tree(), mode=self.mode, fullgraph=True, dynamic=False))


class CompiledRunner(Runner):
    """Marks where each step begins, so that CUDA graphs may overwrite the output of the previous step."""

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(index)
