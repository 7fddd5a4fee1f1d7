"""Where the values of a schedule's reused entries come from: the latest steps that computed their site.

A site is *weighted* if any of its entries has other weights than `[1]`. All reused entries of a weighted site take the
same number of values, so that weights make no patterns of their own: an entry that uses fewer takes its latest value
again, with weight 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.indices import SiteIndex, StepIndex
from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule.weights import Weights, reach


@dataclass(frozen=True, eq=False)
class Histories:
    """The values that each reused entry takes, and their weights.

    Attributes:
        weights: `[steps, sites, order]`, newest value first; 0 where an entry is computed.
        steps: int `[steps, sites, order]`: the step that computed each value; -1 where there is none.
        taken: int `[sites]`: how many values the weighted sum of a site takes; 0 if the site is not weighted.
    """

    weights: Weights
    steps: NDArray[np.int64]
    taken: NDArray[np.int64]

    def values(self, site: SiteIndex) -> int:
        """How many values a reused entry of the site takes, 1 if the site is not weighted."""
        return max(1, int(self.taken[site]))

    def source(self, step: StepIndex, site: SiteIndex, age: int) -> StepIndex:
        """The step that computed the `age`-th latest value that a reused entry takes."""
        found = self.steps[step, site, age]
        return StepIndex(int(found if found >= 0 else self.steps[step, site, 0]))


@functools.lru_cache(maxsize=64)
def histories(schedule: Schedule) -> Histories:
    """The histories of a schedule's entries."""
    weights, compute = schedule.entry_weights, schedule.compute
    used = reach(weights)
    plain = (used == 0) | ((used == 1) & (weights[:, :, 0] == 1.0))
    taken = np.where(plain.all(axis=0), 0, used.max(axis=0))
    return Histories(weights, _steps(compute, used, weights.shape[2]), taken)


def _steps(compute: NDArray[np.bool_], used: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    found = np.full((*compute.shape, order), -1)
    latest = np.full((compute.shape[1], order), -1)  # per site, newest first
    for step, row in enumerate(compute):
        for age in range(order):
            found[step, :, age] = np.where(used[step] > age, latest[:, age], -1)
        latest[row] = np.column_stack([np.full(row.sum(), step), latest[row, :-1]])
    return found
