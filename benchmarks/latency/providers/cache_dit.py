"""cache-dit (optional): its static step mask, and DBCache, which decides in every step; eager and under torch.compile.

The first block is always computed, as in cache-dit's published results. DBCache gets the same mask and a threshold
above every difference: it computes its decision in every step, and does about as much work as the schedule leaves.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import CountedRunner, Role, as_bits, first_only, mask_within, probe

Policy = Literal["static", "dynamic"]
ANY_DIFFERENCE = 1e9  # a threshold above every difference


@dataclass(frozen=True)
class CacheDit:
    """cache-dit with one policy for its cached steps."""

    policy: Policy
    compiled: bool
    role: Role = "peer"

    @property
    def name(self) -> str:
        """See `Provider.name`."""
        kind = {"static": "step mask", "dynamic": "DBCache"}[self.policy]
        return f"cache-dit, {kind}{', compiled' * self.compiled}"

    def applies(self, task: Task) -> str | None:
        """None if cache-dit is installed."""
        installed = "cache_dit" in sys.modules or importlib.util.find_spec("cache_dit") is not None
        return None if installed else "not installed"

    def prepare(self, task: Task) -> CountedRunner:
        """The model with cache-dit enabled."""
        return CacheDitRunner(task, self.policy, compiled=self.compiled)


class CacheDitRunner(CountedRunner):
    """A transformer without a pipeline; `reset` renews cache-dit's context, which is not renewed on its own."""

    def __init__(self, task: Task, policy: Policy, *, compiled: bool) -> None:
        cache_dit = importlib.import_module("cache_dit")
        self._cache_dit = cache_dit
        self._policy = policy
        self._model = task.case.tree()
        super().__init__(task, self._model)
        self.computes = first_only(task.case.steps)
        cache_dit.enable_cache(self._model, cache_config=self._config())
        self.computes = task.peer_mask or mask_within(task, probe(self))
        # the FLOPs of compiled products cannot be counted; if a mask is given, they were counted before
        self._theory = math.nan if task.peer_mask else super().theory()
        if compiled:
            self._denoise = torch.compile(self._model, dynamic=False)

    def reset(self) -> None:
        """See `Runner.reset`."""
        self._cache_dit.refresh_context(self._model, cache_config=self._config())

    def theory(self) -> float:
        """See `Runner.theory`; counted before the model was compiled, NaN if a mask was given."""
        return self._theory

    def close(self) -> None:
        """See `Runner.close`."""
        self._cache_dit.disable_cache(self._model)

    def _config(self) -> Any:
        return self._cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=ANY_DIFFERENCE,
            enable_separate_cfg=False,
            num_inference_steps=self.task.case.steps,
            steps_computation_mask=as_bits(self.computes),
            steps_computation_policy=self._policy,
        )
