"""The methods that are compared: each makes a schedule whose speed-up is as close to a point's as possible."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.cost import costs_of
from benchmarks.quality.images import GUIDANCE
from harmonica_rt.schedule import Schedule
from harmonica_training import ClassLabels, TrainConfig, train
from harmonica_training.baselines import calibrate, fewer_steps, fora, learning_to_cache, random_at
from harmonica_training.digits import load_split
from harmonica_training.setting import Setting


@dataclass(frozen=True)
class Point:
    """One point of the comparison: steps of the uncached run, and the wanted speed-up over it."""

    steps: int
    speedup: float

    def __str__(self) -> str:
        return f"{self.steps}@{self.speedup}"


@dataclass(frozen=True)
class Budget:
    """What a method may spend on a schedule.

    Attributes:
        iterations: training iterations, each with a walk: a run with a gradient per step.
        settling: iterations if training also measures schedules; fewer, for about the same work.
        batch: samples per walk.
        learning_rate: learning rate of the routers.
        renew_every: iterations between renewals of lambda.
        calibration: batches for the calibration of SmoothCache.
        validation: batches on which schedules are measured.
    """

    iterations: int
    settling: int
    batch: int
    learning_rate: float
    renew_every: int
    calibration: int
    validation: int


# Forwards of a batch per iteration at 20 steps and 1.5x, a gradient counted as two: 80 to walk, 42 for lambda.
# Measuring schedules takes 27 more for the current one and 13 to 53 for each of 8 exchanges, mostly close to 13.
FULL = Budget(iterations=40, settling=16, batch=2, learning_rate=0.2, renew_every=5, calibration=8, validation=4)
QUICK = Budget(iterations=2, settling=2, batch=2, learning_rate=0.2, renew_every=1, calibration=1, validation=1)

PAIRS_PER_STEP = 0.75  # a walk costs 3 forwards per step, a pair of Learning-to-Cache 4: equal work per iteration


@dataclass(frozen=True)
class Produced:
    """A schedule, and the seconds of its training or calibration.

    A schedule with fewer steps than its point is sampled with its own steps; its images are compared with the point's.
    """

    schedule: Schedule
    seconds: float = 0.0


Producer = Callable[[Any, Point, int, Budget], Produced]
"""(pipeline, point, seed, budget) -> what was produced; the pipeline is left unchanged."""


def _random(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    return Produced(random_at(point.steps, costs_of(pipeline.transformer), point.speedup, seed=seed))


def _fora(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    return Produced(fora(point.steps, costs_of(pipeline.transformer), point.speedup))


def _fewer_steps(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    sites = costs_of(pipeline.transformer).sites
    return Produced(Schedule.all_compute(steps=fewer_steps(point.steps, point.speedup), sites=sites))


def _smoothcache(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    started = time.perf_counter()
    setting = Setting(pipeline, _config(point, seed, budget))
    batches = ((setting.inputs(i), setting.generators(i)) for i in range(budget.calibration))
    schedule = calibrate(setting.loop, setting.cached, batches).at_speedup(setting.costs, point.speedup)
    return Produced(schedule, time.perf_counter() - started)


def _learned(pipeline: Any, point: Point, seed: int, budget: Budget, **options: Any) -> Produced:
    started = time.perf_counter()
    result = train(pipeline, _config(point, seed, budget, **options))
    return Produced(result.schedule, time.perf_counter() - started)


def _learning_to_cache(pipeline: Any, point: Point, seed: int, budget: Budget) -> Produced:
    started = time.perf_counter()
    costs = costs_of(pipeline.transformer)
    every_second = Schedule.every(2, steps=point.steps, sites=costs.sites).compute  # the steps that it may reuse
    point = dataclasses.replace(point, speedup=min(point.speedup, costs.speedup(every_second)))
    data = load_split(pipeline.vae.config.sample_size)
    with torch.no_grad():
        images = data.train_images.to(pipeline.device) * 2 - 1
        latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
    result = train(
        pipeline,
        _config(point, seed, budget, image_error=None, **_PAPER),
        conditions=ClassLabels(data.train_labels.tolist()),
        objective=learning_to_cache(latents, pairs=round(point.steps * PAIRS_PER_STEP)),
    )
    return Produced(result.schedule, time.perf_counter() - started)


def _config(point: Point, seed: int, budget: Budget, **options: Any) -> TrainConfig:
    return TrainConfig(
        steps=point.steps,
        target_speedup=point.speedup,
        guidance=GUIDANCE,
        iterations=budget.settling if options.get("gates") == "hard" else budget.iterations,
        batch=budget.batch,
        learning_rate=budget.learning_rate,
        renew_every=budget.renew_every,
        validation_batches=budget.validation,
        seed=seed,
        **options,
    )


_PAPER: dict[str, Any] = {"gates": "soft", "coherence": 0.0, "spread": 1.0}
_OURS: dict[str, Any] = {"gates": "hard", "coherence": 1.0, "spread": 1.5}

PRODUCERS: dict[str, Producer] = {
    "harmonica-rt": functools.partial(_learned, image_error="sensitivity", **_OURS),
    "harmonica": functools.partial(_learned, image_error="leave-one-out", **_PAPER),
    "harmonica-progressive": functools.partial(_learned, image_error="progressive", **_PAPER),
    "sdt": functools.partial(_learned, image_error=None, **_PAPER),
    "l2c": _learning_to_cache,
    "smoothcache": _smoothcache,
    "fora": _fora,
    "random": _random,
    "fewer-steps": _fewer_steps,
}
