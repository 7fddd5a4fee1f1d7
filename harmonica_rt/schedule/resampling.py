"""The mask of a schedule for another number of steps, made of rows that the schedule has, so that few programs are new.

Each site is to be computed as often per step as at the same share of the run before. Taking the row that is nearest in
time would not do that: every second row of "compute every second step" always computes, or never.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def resampled_rows(compute: NDArray[np.bool_], steps: int) -> NDArray[np.int64]:
    """For each of `steps` new steps, which row of the mask `[old steps, sites]` it takes; row 0 for step 0.

    With as many steps as before, these are the rows in their order.
    """
    old = len(compute)
    due = _due(compute, steps)
    reach = _longest_reuse(compute) + 1
    rows = np.zeros(steps, dtype=np.int64)
    done = np.zeros(compute.shape[1])
    for step in range(steps):
        at = step * old / steps
        first, last = max(int(at) - reach, 0), min(int(np.ceil((step + 1) * old / steps)) + reach, old)
        if step:
            missed = np.abs(done + compute[first:last] - due[step]).sum(axis=1)
            distance = np.abs(np.arange(first, last) - at)
            rows[step] = first + np.lexsort((distance, missed))[0]
        done += compute[rows[step]]
    return rows


def _due(compute: NDArray[np.bool_], steps: int) -> NDArray[np.float64]:
    """`[steps, sites]`: how often each site should have been computed up to and including each new step.

    A site that is computed at the old steps `c_0 = 0, c_1, ...` is due at the rate `1 / (c_j+1 - c_j)` between them.
    """
    old, sites = compute.shape
    at = np.arange(steps) * old / steps
    due = np.empty((steps, sites))
    for site in range(sites):
        computed = np.flatnonzero(compute[:, site])
        counts = np.interp(at, [*computed, old], np.arange(len(computed) + 1))
        due[:, site] = 1 + np.floor(counts * steps / old + 1e-9)
    return due


def _longest_reuse(compute: NDArray[np.bool_]) -> int:
    """The most steps in a row at which a site is reused."""
    longest, current = 0, np.zeros(compute.shape[1], dtype=np.int64)
    for row in compute:
        current = np.where(row, 0, current + 1)
        longest = max(longest, int(current.max()))
    return longest
