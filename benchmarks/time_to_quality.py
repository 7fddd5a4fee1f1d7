"""How long training takes to the quality that Learning-to-Cache ends with, at the same speed-up on the bundled model.

Each method is trained from the beginning with growing budgets, once a seed; the methods take turns, so that a machine
that drifts drifts for both. The quality of a schedule is the PSNR of its images to the uncached ones of the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.quality import images
from benchmarks.quality.cost import costs_of
from benchmarks.quality.metrics import psnr
from benchmarks.quality.producers import FULL, PRODUCERS, QUICK, Budget, Point
from benchmarks.rows import Row
from benchmarks.timing import Spread
from harmonica_rt.demo import bundled_model
from harmonica_rt.schedule import Schedule
from harmonica_training.digits import load_pipeline

POINT = Point(20, 1.5)
THEIRS = "l2c"
OURS = ("harmonica", "harmonica-rt")  # the paper's method, and what `train` does unless told otherwise
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the quality benchmark's budget
SEEDS = 3


@dataclass(frozen=True)
class Trained:
    """What a training took and gave."""

    seconds: float
    psnr: float


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Seconds of training and PSNR for each budget, and the ratio of the times to the same quality."""
    seeds = range(1 if quick else min(repeats, SEEDS))
    point, budget, count = (Point(4, 1.5), QUICK, 4) if quick else (POINT, FULL, 100)
    shares = (1.0,) if quick else SHARES
    for method in (THEIRS, *OURS):  # what is loaded once is no part of a training
        trained(method, Point(4, point.speedup), 0, QUICK, 2)
    results: dict[tuple[str, float], list[Trained]] = {}
    for seed in seeds:
        for share in shares:
            for method in (THEIRS, *OURS):
                found = trained(method, point, seed, part(budget, share), count)
                results.setdefault((method, share), []).append(found)
    case = f"bundled, {point}, {count} images"
    rows = []
    for (method, share), runs in results.items():
        name = f"{method}, {part(budget, share).iterations / budget.iterations:g} of the budget"
        rows.append(_row(case, name, "training", [run.seconds for run in runs], "s"))
        rows.append(_row(case, name, "PSNR", [run.psnr for run in runs], "dB"))
    for method in OURS:
        ratios = []
        for index in range(len(seeds)):
            theirs = [results[THEIRS, share][index] for share in shares]
            ours = [results[method, share][index] for share in shares]
            ratios.append(time_ratio(ours, theirs))
        reached = [ratio for ratio in ratios if ratio is not None]
        name = f"{method} / {THEIRS}"
        rows.append(
            Row("time_to_quality", case, name, "seeds that reach it", len(reached), "count", repeats=len(ratios))
        )
        if reached:
            rows.append(_row(case, name, "time to its best PSNR", reached, "ratio", "at most 0.75"))
    return rows


def part(budget: Budget, share: float) -> Budget:
    """A share of the iterations of a budget, at least one; all else stays."""
    return replace(
        budget, iterations=max(1, round(budget.iterations * share)), settling=max(2, round(budget.settling * share))
    )


def trained(method: str, point: Point, seed: int, budget: Budget, count: int) -> Trained:
    """Train, sample `count` images with and without the schedule."""
    pipeline = load_pipeline(bundled_model())
    produced = PRODUCERS[method](pipeline, point, seed, budget)
    everything = Schedule.all_compute(steps=point.steps, sites=costs_of(pipeline.transformer).sites)
    truth = images.generate(pipeline, everything, count=count, seed=seed).float() / 255
    found = images.generate(pipeline, produced.schedule, count=count, seed=seed).float() / 255
    return Trained(produced.seconds, float(psnr(found, truth).mean()))


def time_ratio(ours: list[Trained], theirs: list[Trained]) -> float | None:
    """Shortest of our trainings that is as good as their best / the shortest of theirs that is; None if none is."""
    best = max(theirs, key=lambda result: result.psnr)
    enough = [result.seconds for result in ours if result.psnr >= best.psnr]
    return min(enough) / best.seconds if enough else None


def _row(case: str, name: str, metric: str, values: list[float], unit: str, target: str | None = None) -> Row:
    spread = Spread.of([float(value) for value in np.asarray(values)])
    low, high = (spread.p20, spread.p80) if len(values) > 1 else (None, None)
    return Row("time_to_quality", case, name, metric, spread.p50, unit, low, high, len(values), target)
