"""The methods: each makes a schedule as near to a point's speed-up as it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.cost import costs_of
from harmonica_rt.schedule import MadeBy, Schedule


@dataclass(frozen=True)
class Point:
    """One place of the comparison: steps of the uncached run, and the speed-up over it that is asked for."""

    steps: int
    speedup: float

    def __str__(self) -> str:
        return f"{self.steps}@{self.speedup}"


@dataclass(frozen=True)
class Budget:
    """What a method may spend on a schedule.

    Attributes:
        iterations: training iterations, each one walk over all steps.
        batch: samples of one walk.
    """

    iterations: int
    batch: int


FULL = Budget(iterations=200, batch=8)
QUICK = Budget(iterations=2, batch=2)


@dataclass(frozen=True)
class Produced:
    """A schedule, and the seconds of its training or calibration.

    A schedule of fewer steps than its point is sampled with that many, and compared with the point's uncached images.
    """

    schedule: Schedule
    seconds: float = 0.0


Producer = Callable[[Any, Point, int, Budget], Produced]
"""(pipeline, point, seed, budget) -> what was produced; the pipeline is left as it came."""


def random(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    """Random entries. Those of a lower CUR are among those of a higher one, so cost falls with CUR."""
    costs = costs_of(pipeline.transformer)
    entries = point.steps * len(costs.sites)

    def reusing(count: int) -> Schedule:
        return Schedule.random(count / entries, steps=point.steps, sites=costs.sites, seed=seed)

    return Produced(nearest(range(entries - len(costs.sites) + 1), reusing, costs.speedup, point.speedup))


def fora(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    """All sites alike, computed at n evenly spaced steps round(i T / n), 0 <= i < n (FORA, arXiv 2407.01425)."""
    costs = costs_of(pipeline.transformer)

    def leaving_out(count: int) -> Schedule:
        computed = point.steps - count
        mask = np.zeros((point.steps, len(costs.sites)), bool)
        mask[[round(index * point.steps / computed) for index in range(computed)]] = True
        return Schedule.from_array(mask, costs.sites, made_by=MadeBy("fora", {"computed_steps": computed}))

    return Produced(nearest(range(point.steps), leaving_out, costs.speedup, point.speedup))


def fewer_steps(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    """No cache, but a sampler of fewer steps."""
    sites = costs_of(pipeline.transformer).sites

    def leaving_out(count: int) -> Schedule:
        return Schedule.all_compute(steps=point.steps - count, sites=sites)

    return Produced(nearest(range(point.steps), leaving_out, lambda s: point.steps / s.steps, point.speedup))


PRODUCERS: dict[str, Producer] = {
    "fora": fora,
    "random": random,
    "fewer-steps": fewer_steps,
}


def nearest(
    counts: range, make: Callable[[int], Schedule], speedup: Callable[[Schedule], float], target: float
) -> Schedule:
    """Of the schedules `make(count)`, whose speed-ups rise with the count, the one nearest to the target."""
    low, high = counts[0], counts[-1]
    while high - low > 1:
        middle = (low + high) // 2
        if speedup(make(middle)) < target:
            low = middle
        else:
            high = middle
    return min((make(low), make(high)), key=lambda schedule: abs(speedup(schedule) - target))
