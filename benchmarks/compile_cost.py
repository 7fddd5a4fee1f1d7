"""Measures the cost of compiling: seconds and peak memory at DiT-XL/2 geometry, for 20 steps with 10 patterns.

Also counts what the `inductor` lowering compiles, and times the loading of a saved plan.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.memory import PeakMemory
from benchmarks.rows import Row


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Load, run once, compile and run a few steps, while the resident size of the process is sampled."""
    del repeats  # one compile: its memory can be measured only once per process
    case = models.dit_xl_2(2, 20) if not quick else models.dit_12x384(2, 20)
    sites = hrt.find_sites(case.model)
    schedule = schedules.ten_patterns(sites, 20)
    with PeakMemory() as loaded, torch.no_grad():
        case.model(**case.calls[0])
    with PeakMemory() as compiled:
        model = hrt.compile(case.model, schedule, strict=True)
        for call in case.calls[:4]:
            model(**call)
    report = model.report().plans[0]
    row = functools.partial(_row, case.name, f"10 patterns ({schedule.patterns} rows)")
    return [
        row("compile", report.times.total, "s", "at most 25"),
        row("capture", report.times.capture, "s"),
        row("plan", report.times.plan, "s"),
        row("lower", report.times.lower, "s"),
        row("step programs", report.programs, "count"),
        row("model + one forward, peak", loaded.peak, "bytes"),
        row("compile + run, peak", compiled.peak, "bytes"),
        row("peak / (model + one forward)", compiled.peak / loaded.peak, "ratio", "at most 1.15"),
        *_load_rows(case, row, model),
        *_inductor_rows(case, row, schedule),
    ]


def _row(case: str, schedule: str, metric: str, value: float, unit: str, target: str | None = None) -> Row:
    return Row("compile_cost", case, schedule, metric, value, unit, target=target)


def _load_rows(case: models.Case, row: Callable[..., Row], model: hrt.CompiledModel) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        model.save(path)
        size = path.stat().st_size
        started = time.perf_counter()
        loaded = hrt.load(path, case.model, strict=True)
        seconds = time.perf_counter() - started
    if len(loaded.report().plans) != 1:
        raise ValueError(f"one plan was saved, but {len(loaded.report().plans)} were loaded")
    return [
        row("load of the saved plan", seconds, "s"),
        row("saved plan", size, "bytes"),
    ]


def _inductor_rows(case: models.Case, row: Callable[..., Row], schedule: hrt.Schedule) -> list[Row]:
    model = hrt.compile(case.model, schedule, lowering="inductor", strict=True)
    model(**case.calls[0])
    report = model.report().plans[0]
    if report.regions is None:
        raise ValueError("the report of the `inductor` lowering has no regions")
    return [
        row("inductor: compile", report.times.total, "s"),
        row("inductor: of that, Inductor's", report.regions.seconds, "s"),
        row("inductor: regions compiled", report.regions.unique, "count", "at most 8"),
        row("inductor: calls of regions", sum(report.regions.calls), "count"),
    ]
