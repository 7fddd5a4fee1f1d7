"""The plain side of a world: runs the plain pipeline through the oracle, which gives the right result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.soak.oracle import Oracle
from benchmarks.soak.outcome import Outcome
from benchmarks.soak.side import Side
from benchmarks.soak.world import Run, World


class Plain(Side):
    """The plain pipeline, whose calls go through the oracle."""

    def __init__(self, world: World, schedule: Any) -> None:
        super().__init__(world)
        self.oracle = Oracle(schedule, self.state)

    def sample(self, run: Run) -> Outcome:
        """Sample one run under the schedule; what happens before it is left to the plain model."""
        outcome = Outcome()
        for kind in run.before:
            self.before(kind, run, outcome)
        self.oracle.begin(run.request.first)
        alone = replace(run, before=())
        with self.oracle.watching(self.pipeline.transformer), self.oracle.counting(self.pipeline.scheduler):
            found = super().sample(alone)
        found.outside = outcome.outside + found.outside
        found.counts = self.oracle.counts
        return found

    def call_from_outside(self, seed: int, *, with_gradient: bool) -> list[torch.Tensor]:
        """Call the plain model without the oracle."""
        with self.oracle.aside():
            return super().call_from_outside(seed, with_gradient=with_gradient)
