"""Feature caches of diffusers: FirstBlockCache, TaylorSeer, Pyramid Attention Broadcast.

All decide in every step, in Python. Each still makes its decision, but is steered to the number of computed steps whose
theoretical speed-up is closest to the schedule's without exceeding it. So methods are compared at equal work, not by
their thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry

from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import (
    CountedRunner,
    Role,
    fewest_computed,
    first_only,
    mask_within,
    probe,
)

LEADER = "fbc_leader_block_hook"  # name of the hook that decides


@dataclass(frozen=True)
class DiffusersCache:
    """A cache of diffusers, with the runner that steers it."""

    name: str
    runner: Callable[[Task], CachedRunner]
    role: Role = "peer"

    def applies(self, task: Task) -> str | None:
        """None if the model can enable caches."""
        if hasattr(task.case.model, "enable_cache"):
            return None
        return f"{type(task.case.model).__name__} has no enable_cache (diffusers' CacheMixin)"

    def prepare(self, task: Task) -> CountedRunner:
        """The model with the cache enabled."""
        return self.runner(task)


class CachedRunner(CountedRunner):
    """A model whose hooks keep state between steps, called in a cache context as in pipelines."""

    def __init__(self, task: Task, config: Any) -> None:
        self._model = cast(Any, task.case.tree())
        super().__init__(task, self._model)
        self._model.enable_cache(config)

    def reset(self) -> None:
        """See `Runner.reset`."""
        HookRegistry.check_if_exists_or_initialize(self._model).reset_stateful_hooks()

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        with self._model.cache_context("cond"):
            return super().step(index)

    def close(self) -> None:
        """See `Runner.close`."""
        self._model.disable_cache()


class FirstBlockRunner(CachedRunner):
    """FirstBlockCache: compares the first block's residual with the previous one; the threshold follows the mask."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, FirstBlockCacheConfig(threshold=0.0))
        registries: Any = (getattr(module, "_diffusers_hook", None) for module in self._model.modules())
        self._leader: Any = next(hook for registry in registries if registry and (hook := registry.get_hook(LEADER)))
        self.computes = first_only(task.case.steps)
        self.computes = task.peer_mask or mask_within(task, probe(self))

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        self._leader.threshold = -1.0 if self.computes[index] else math.inf
        return super().step(index)


class PyramidRunner(CachedRunner):
    """Pyramid Attention Broadcast: reuses attention while the timestep is in a range; the timestep follows the mask."""

    def __init__(self, task: Task) -> None:
        self._timestep = 0
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=1 << 30,
            spatial_attention_timestep_skip_range=(0, 2),
            current_timestep_callback=lambda: self._timestep,
        )
        super().__init__(task, config)
        self.computes = first_only(task.case.steps)
        self.computes = task.peer_mask or mask_within(task, probe(self))

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        self._timestep = 0 if self.computes[index] else 1
        return super().step(index)


class TaylorSeerRunner(CachedRunner):
    """TaylorSeer in its lite mode: at a fixed interval, it skips the blocks and extrapolates the last projection."""

    def __init__(self, task: Task) -> None:
        steps = task.case.steps
        super().__init__(task, _taylor(1, steps))
        needed = (
            sum(task.peer_mask)
            if task.peer_mask
            else fewest_computed(task.plan.full_flops, probe(self), steps, task.theory)
        )
        self._model.disable_cache()
        before, interval = _taylor_settings(needed, steps)
        self._model.enable_cache(_taylor(before, interval))
        self.computes = _taylor_mask(before, interval, steps)


def _taylor(before: int, interval: int) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=before, max_order=1, use_lite_mode=True
    )


def _taylor_mask(before: int, interval: int, steps: int) -> tuple[bool, ...]:
    return tuple(step < before or (step - before - 1) % interval == 0 for step in range(steps))


def _taylor_computed(choice: tuple[int, int], steps: int) -> int:
    before, interval = choice
    return sum(_taylor_mask(before, interval, steps))


def _taylor_settings(needed: int, steps: int) -> tuple[int, int]:
    """Number of first steps and interval that compute at least `needed` steps, as few as possible, starting early."""
    choices = [(before, interval) for before in range(1, steps + 1) for interval in range(1, steps + 1)]
    enough = [choice for choice in choices if _taylor_computed(choice, steps) >= needed]
    return min(enough, key=lambda choice: (_taylor_computed(choice, steps), choice))
