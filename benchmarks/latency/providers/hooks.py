"""Runs the schedule as released code does: each site's forward is replaced, and Python reuses outputs from a dict.

Only the sites are skipped: norm and modulate before a reused site still run, and so does what feeds a site that is the
last of several layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import CountedRunner, Role


@dataclass(frozen=True)
class Hooks:
    """The schedule, run with patched forwards."""

    name: str = "hooks, eager"
    role: Role = "hooks"

    def applies(self, task: Task) -> str | None:
        """None: it applies to every task."""
        return None

    def prepare(self, task: Task) -> HookedRunner:
        """The patched model."""
        return HookedRunner(task, task.case.tree())


class HookedRunner(CountedRunner):
    """Keeps the latest output of every site."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__(task, model)
        self.computes = tuple(bool(row.all()) for row in task.schedule.compute)
        self._rows: list[list[bool]] = task.schedule.compute.tolist()
        self._row = self._rows[0]
        self._outputs: dict[int, Any] = {}
        self._modules = [model.get_submodule(site) for site in task.schedule.sites]
        for site, module in enumerate(self._modules):
            module.forward = self._cached(site, module.forward)

    def reset(self) -> None:
        """See `Runner.reset`."""
        self._outputs.clear()

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        self._row = self._rows[index]
        return super().step(index)

    def close(self) -> None:
        """See `Runner.close`."""
        self._outputs.clear()
        for module in self._modules:
            del module.forward

    def _cached(self, site: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._row[site]:
                self._outputs[site] = forward(*args, **kwargs)
            return self._outputs[site]

        return call
