"""Makes schedules by rule, each as near as it can be to a theoretical speed-up."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.schedule import MadeBy, Schedule
from harmonica_rt.schedule.producers import check_count, random_mask
from harmonica_training.costs import SiteCosts
from harmonica_training.errors import TrainingError

_TRIED = 256  # candidates tried across the whole range; if there are fewer than twice as many, all are tried


def fora(steps: int, costs: SiteCosts, speedup: float) -> Schedule:
    """Compute all sites at n evenly spaced steps `round(i * steps / n)`, none at the others (FORA, arXiv 2407.01425).

    Args:
        steps: number of steps (NFE).
        costs: the costs of the sites.
        speedup: theoretical speed-up to come near to, at least 1; it determines n.

    Raises:
        TrainingError: the speed-up is below 1, or cannot be reached even with n = 1.
    """
    check_count(steps, "steps")

    def mask(left_out: int) -> NDArray[np.bool_]:
        computed = steps - left_out
        rows = np.zeros(steps, np.bool_)
        rows[[round(index * steps / computed) for index in range(computed)]] = True
        return np.repeat(rows[:, None], len(costs.sites), axis=1)

    left_out, reached = nearest(steps, lambda count: costs.speedup(mask(count)), speedup)
    made_by = MadeBy("fora", {"computed_steps": steps - left_out, "target_speedup": speedup, "speedup": reached})
    return Schedule.from_array(mask(left_out), costs.sites, made_by=made_by)


def random_at(steps: int, costs: SiteCosts, speedup: float, *, seed: int) -> Schedule:
    """Reuse random entries after the first step, as many as come nearest to the speed-up.

    With the same seed, the reused entries of a lower speed-up are among those of a higher one.

    Args:
        steps: number of steps (NFE).
        costs: the costs of the sites.
        speedup: theoretical speed-up to come near to, at least 1.
        seed: determines the order in which entries are drawn.

    Raises:
        TrainingError: the speed-up is below 1, or cannot be reached even with every entry reused.
        ScheduleError: `seed` is negative.
    """
    sites = len(costs.sites)
    entries = check_count(steps, "steps") * sites

    def mask(reused: int) -> NDArray[np.bool_]:
        return random_mask(reused / entries, steps, sites, seed)

    reused, reached = nearest(entries - sites + 1, lambda count: costs.speedup(mask(count)), speedup)
    made_by = MadeBy("random", {"reused": reused, "seed": seed, "target_speedup": speedup, "speedup": reached})
    return Schedule.from_array(mask(reused), costs.sites, made_by=made_by)


def fewer_steps(steps: int, speedup: float) -> int:
    """The number of steps n, 1 ... `steps`, at which a run without a cache is nearest to `speedup` times as fast.

    Raises:
        TrainingError: the speed-up is below 1 or above `steps`.
    """
    left_out, _ = nearest(check_count(steps, "steps"), lambda count: steps / (steps - count), speedup)
    return steps - left_out


def nearest(count: int, reached: Callable[[int], float], speedup: float) -> tuple[int, float]:
    """The candidate, 0 ... `count - 1`, that comes nearest to `speedup`, and the speed-up that it reaches.

    If there are many candidates, some across the range are tried, then all around the best of those. That finds the
    nearest one if the speed-up grows with the candidate's number.

    Args:
        count: number of candidates, at least 1.
        reached: returns the theoretical speed-up of a candidate.
        speedup: theoretical speed-up to come near to, at least 1.

    Raises:
        TrainingError: the speed-up is below 1 or not finite, or no candidate is as fast.
    """
    if not 1 <= speedup < math.inf:
        raise TrainingError(f"speedup: expected a number of at least 1, got {speedup}")
    stride = max(1, count // _TRIED)
    found = {index: reached(index) for index in {*range(0, count, stride), count - 1}}
    most = max(found.values())
    if speedup > most:
        raise TrainingError(
            f"speedup: {speedup:g} cannot be reached; the most that this method reuses gives {most:.4g}"
        )

    def distance(index: int) -> tuple[float, int]:
        return abs(found[index] - speedup), index

    if stride > 1:
        best = min(found, key=distance)
        around = range(max(0, best - stride), min(count, best + stride + 1))
        found.update({index: reached(index) for index in around if index not in found})
    best = min(found, key=distance)
    return best, found[best]
