"""Schedules by rule, at a theoretical speed-up: evenly spaced steps, random entries, and a run of fewer steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.schedule import MadeBy, Schedule
from harmonica_rt.schedule.producers import check_count, random_mask
from harmonica_training.costs import SiteCosts
from harmonica_training.errors import TrainingError

_TRIED = 256  # candidates tried across the whole range; all of them where there are less than twice as many


def fora(steps: int, costs: SiteCosts, speedup: float) -> Schedule:
    """All sites alike, computed at n evenly spaced steps `round(i * steps / n)` (FORA, arXiv 2407.01425).

    Args:
        steps: of the run (NFE).
        costs: of the sites.
        speedup: theoretical; n is the number of steps that comes nearest to it.

    Raises:
        TrainingError: the speed-up cannot be reached, even with n = 1.
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
    """Random entries are reused, none of them at the first step; as many as come nearest to the speed-up.

    With one seed, the entries of a lower speed-up are among those of a higher one.

    Args:
        steps: of the run (NFE).
        costs: of the sites.
        speedup: theoretical.
        seed: of the order in which entries are drawn.

    Raises:
        TrainingError: the speed-up cannot be reached, even with every entry reused.
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
        TrainingError: the speed-up is larger than `steps`.
    """
    left_out, _ = nearest(check_count(steps, "steps"), lambda count: steps / (steps - count), speedup)
    return steps - left_out


def nearest(count: int, reached: Callable[[int], float], speedup: float) -> tuple[int, float]:
    """Which of the candidates 0 ... `count - 1` comes nearest to `speedup`, and what it reaches.

    Of many candidates a part is tried, then all around the best of them: the nearest of all where the speed-up grows
    with the number of the candidate.

    Args:
        count: of candidates, at least 1.
        reached: the theoretical speed-up of a candidate.
        speedup: what to come near to, at least 1.

    Raises:
        TrainingError: no candidate is as fast.
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
