"""Compares whole runs of the `fused` lowering with the uncached eager model, and measures what each part of it gains.

The theoretical speed-up is FLOPs of the uncached model / FLOPs that the schedule leaves. What the prologue computes is
not subtracted, so a realised / theoretical ratio above 1 is what a static plan gains beyond the schedule. Providers
take turns; each runs all steps, its prologue included, with timesteps known from an earlier run. A schedule is timed
only after the outputs of its first steps were compared with the reference.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.rows import Row, spread_row
from benchmarks.timing import interleaved
from harmonica_rt.api import CompiledModel
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.options import HOISTED, CompileOptions

STEPS = 20
CHECKED = 4  # steps compared with the reference
LOWERINGS = ("plain", HOISTED, "fused")  # each adds one thing: graphs, the prologue, fused ops


def run(*, repeats: int, quick: bool, only: str = "") -> list[Row]:
    """The bundled model at batch 1 and 8, and PixArt-XL and DiT-XL/2 geometry; the cases whose names contain `only`."""
    if quick:
        return _case(models.bundled(1, 4), repeats, "at least 1.35")
    few = min(repeats, 3)  # a round takes minutes
    cases: dict[str, tuple[Callable[[], models.Case], int, str]] = {
        "bundled, batch 1": (lambda: models.bundled(1, STEPS), repeats, "at least 1.35"),
        "bundled, batch 8": (lambda: models.bundled(8, STEPS), repeats, "at least 1.10"),
        "PixArt-XL": (lambda: models.pixart_xl(2, STEPS), few, "at least 1.08"),
        "DiT-XL": (lambda: models.dit_xl_2(2, STEPS), few, "at least 1.02"),
    }
    chosen = [case for name, case in cases.items() if only in name]
    if not chosen:
        raise ValueError(f"no case's name contains {only!r}; the cases are {', '.join(cases)}")
    return [row for build, rounds, target in chosen for row in _case(build(), rounds, target)]


def _case(case: models.Case, repeats: int, target: str) -> list[Row]:
    sites = hrt.find_sites(case.model)
    rows = []
    for name, schedule in schedules.released(sites, len(case.calls)).items():
        _check(case, schedule)
        compiled = {lowering: _compile(case, schedule, lowering) for lowering in LOWERINGS}
        providers: dict[str, Callable[[], object]] = {"uncached": case.run_uncached}
        for lowering, model in compiled.items():
            providers[lowering] = functools.partial(case.run_compiled, model)
            case.run_compiled(model)  # timesteps become known in this run
        seconds = interleaved(providers, repeats)
        theory = compiled["fused"].report().plans[0].theoretical_speedup
        rows.append(Row("end_to_end", case.name, name, "theoretical speed-up", theory, "ratio"))
        rows.append(_row(case, name, "uncached eager run", seconds["uncached"], "s"))
        for lowering in LOWERINGS:
            ratios = [a / b / theory for a, b in zip(seconds["uncached"], seconds[lowering], strict=True)]
            rows.append(_row(case, name, f"{lowering} run", seconds[lowering], "s"))
            goal = target if lowering == "fused" else None
            rows.append(_row(case, name, f"{lowering}, realised / theoretical", ratios, "ratio", goal))
        rows += _step_rows(case, name, compiled["fused"], repeats)
    return rows


def _step_rows(case: models.Case, name: str, model: CompiledModel, repeats: int) -> list[Row]:
    """Time of a step that reuses all sites / time of one that computes all sites; the first step is left out."""
    computed = model.schedule.compute[1:]
    full, idle = computed.all(axis=1), ~computed.any(axis=1)
    if not full.any() or not idle.any():
        return []
    shares = []
    for _ in range(repeats):
        seconds = _step_seconds(model, case)[1:]
        shares.append(float(np.median(seconds[idle]) / np.median(seconds[full])))
    return [_row(case, name, "step that reuses all / step that computes all", shares, "ratio", "at most 0.015, XL")]


@torch.no_grad()
def _step_seconds(model: CompiledModel, case: models.Case) -> NDArray[np.float64]:
    model.reset()
    seconds = []
    for call in case.calls:
        started = time.perf_counter()
        model(**call)
        seconds.append(time.perf_counter() - started)
    return np.array(seconds)


def _check(case: models.Case, schedule: hrt.Schedule) -> None:
    """Compare the first steps with the reference; the reference one precision up makes this slow.

    Raises:
        ParityError: outputs differ from the reference.
    """
    first = hrt.Schedule.from_array(schedule.compute[:CHECKED], sites=schedule.sites)
    if schedule.weights is not None:
        first = first.with_weights(schedule.weights[:CHECKED])
    hrt.verify(case.model, first, calls=case.calls[:CHECKED], lowering="fused")


def _compile(case: models.Case, schedule: hrt.Schedule, lowering: str) -> CompiledModel:
    engine = PlannedEngine(case.model, schedule, CompileOptions(lowering=lowering, strict=True, max_plans=1))
    return CompiledModel(case.model, schedule, engine, verify=False)


def _row(
    case: models.Case, schedule: str, metric: str, values: list[float], unit: str, target: str | None = None
) -> Row:
    return spread_row("end_to_end", case.name, schedule, metric, values, unit, target)
