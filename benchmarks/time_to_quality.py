"""Measures how long training takes to reach the final quality of Learning-to-Cache at equal speed-up.

Each method is trained on the bundled model from the start with growing budgets, once per seed: Learning-to-Cache with
all of them, ours until one is good enough. The methods take turns, so that a drift of the machine affects both. The
quality of a schedule is the PSNR between its images and the uncached images of the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from benchmarks.quality import images
from benchmarks.quality.cost import costs_of
from benchmarks.quality.metrics import psnr
from benchmarks.quality.producers import FULL, PRODUCERS, QUICK, Budget, Point
from benchmarks.rows import Row, spread_row
from harmonica_rt.demo import bundled_model
from harmonica_rt.schedule import Schedule
from harmonica_training.digits import load_pipeline

POINT = Point(20, 1.5)
THEIRS = "l2c"
OURS = ("harmonica", "harmonica-rt")  # the paper's method, and the default of `train`
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the iterations in the quality benchmark's budget
SEEDS = 3


@dataclass(frozen=True)
class Trained:
    """The duration of one training, in seconds, and the PSNR of its schedule, in dB."""

    seconds: float
    psnr: float


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Seconds of training and PSNR for each budget, and the ratio of the times to the same quality."""
    seeds = range(1 if quick else min(repeats, SEEDS))
    point, budget, count = (Point(4, 1.5), QUICK, 4) if quick else (POINT, FULL, 64)
    shares = (1.0,) if quick else SHARES
    for method in (THEIRS, *OURS):  # warm up: loading is not part of a training
        trained(method, Point(4, point.speedup), 0, QUICK, uncached(Point(4, point.speedup), 0, 2))
    results: dict[tuple[str, float], list[Trained]] = {}
    ratios: dict[str, list[float | None]] = {method: [] for method in OURS}
    for seed in seeds:
        truth = uncached(point, seed, count)
        theirs: list[Trained] = []
        for method in (THEIRS, *OURS):
            ours: list[Trained] = []
            for share in shares:
                found = trained(method, point, seed, part(budget, share), truth)
                results.setdefault((method, share), []).append(found)
                (theirs if method == THEIRS else ours).append(found)
                if ours and time_ratio(ours, theirs) is not None:
                    break  # good enough: larger budgets are not needed
            if method != THEIRS:
                ratios[method].append(time_ratio(ours, theirs))
    case = f"bundled, {point}, {count} images"
    rows = []
    for (method, share), runs in results.items():
        name = f"{method}, {part(budget, share).iterations / budget.iterations:g} of the budget"
        rows.append(_row(case, name, "training", [run.seconds for run in runs], "s"))
        rows.append(_row(case, name, "PSNR", [run.psnr for run in runs], "dB"))
    for method, found_ratios in ratios.items():
        reached = [ratio for ratio in found_ratios if ratio is not None]
        name = f"{method} / {THEIRS}"
        rows.append(
            Row("time_to_quality", case, name, "seeds that reach it", len(reached), "count", repeats=len(found_ratios))
        )
        if reached:
            rows.append(_row(case, name, "time to its best PSNR", reached, "ratio", "at most 0.75"))
    return rows


def part(budget: Budget, share: float) -> Budget:
    """The budget with a share of its iterations, at least one; all else is unchanged."""
    return replace(
        budget, iterations=max(1, round(budget.iterations * share)), settling=max(2, round(budget.settling * share))
    )


def uncached(point: Point, seed: int, count: int) -> Tensor:
    """`count` images without a cache, uint8 `[count, 1, H, W]`."""
    pipeline = load_pipeline(bundled_model())
    everything = Schedule.all_compute(steps=point.steps, sites=costs_of(pipeline.transformer).sites)
    return images.generate(pipeline, everything, count=count, seed=seed)


def trained(method: str, point: Point, seed: int, budget: Budget, truth: Tensor) -> Trained:
    """Train a schedule, sample as many images as `truth` has, and compare them with it."""
    pipeline = load_pipeline(bundled_model())
    produced = PRODUCERS[method](pipeline, point, seed, budget)
    found = images.generate(pipeline, produced.schedule, count=len(truth), seed=seed)
    return Trained(produced.seconds, float(psnr(found.float() / 255, truth.float() / 255).mean()))


def time_ratio(ours: list[Trained], theirs: list[Trained]) -> float | None:
    """Seconds of our shortest training that is as good as their best one / seconds of that one; None if none is."""
    best = max(theirs, key=lambda result: result.psnr)
    enough = [result.seconds for result in ours if result.psnr >= best.psnr]
    return min(enough) / best.seconds if enough else None


def _row(case: str, name: str, metric: str, values: list[float], unit: str, target: str | None = None) -> Row:
    return spread_row("time_to_quality", case, name, metric, values, unit, target)
