"""What compiling costs: seconds and peak memory at DiT-XL/2 geometry, 20 steps with 10 distinct patterns.

Also what the `inductor` lowering compiles of it, and what a saved plan takes to load.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import torch

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.rows import Row


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Load, run once, compile, run a few steps; memory is the process's resident size, sampled all the while."""
    del repeats  # one compile: its memory can only be seen once per process
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
    name = f"10 patterns ({schedule.patterns} rows)"
    return [
        Row("compile_cost", case.name, name, "compile", report.times.total, "s", target="at most 25"),
        Row("compile_cost", case.name, name, "capture", report.times.capture, "s"),
        Row("compile_cost", case.name, name, "plan", report.times.plan, "s"),
        Row("compile_cost", case.name, name, "lower", report.times.lower, "s"),
        Row("compile_cost", case.name, name, "step programs", report.programs, "count"),
        Row("compile_cost", case.name, name, "model + one forward, peak", loaded.peak, "bytes"),
        Row("compile_cost", case.name, name, "compile + run, peak", compiled.peak, "bytes"),
        Row(
            "compile_cost",
            case.name,
            name,
            "peak / (model + one forward)",
            compiled.peak / loaded.peak,
            "ratio",
            target="at most 1.15",
        ),
        *_load_rows(case, name, model),
        *_inductor_rows(case, name, schedule),
    ]


def _load_rows(case: models.Case, name: str, model: hrt.CompiledModel) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        model.save(path)
        size = path.stat().st_size
        started = time.perf_counter()
        loaded = hrt.load(path, case.model, strict=True)
        seconds = time.perf_counter() - started
    if len(loaded.report().plans) != 1:
        raise ValueError(f"one plan was saved, {len(loaded.report().plans)} came back")
    return [
        Row("compile_cost", case.name, name, "load of the saved plan", seconds, "s"),
        Row("compile_cost", case.name, name, "saved plan", size, "bytes"),
    ]


def _inductor_rows(case: models.Case, name: str, schedule: hrt.Schedule) -> list[Row]:
    model = hrt.compile(case.model, schedule, lowering="inductor", strict=True)
    model(**case.calls[0])
    report = model.report().plans[0]
    if report.regions is None:
        raise ValueError("the `inductor` lowering says nothing of its regions")
    return [
        Row("compile_cost", case.name, name, "inductor: compile", report.times.total, "s"),
        Row("compile_cost", case.name, name, "inductor: of that, Inductor's", report.regions.seconds, "s"),
        Row(
            "compile_cost",
            case.name,
            name,
            "inductor: regions compiled",
            report.regions.unique,
            "count",
            target="at most 8",
        ),
        Row(
            "compile_cost",
            case.name,
            name,
            "inductor: calls of regions",
            sum(report.regions.calls),
            "count",
        ),
    ]


class PeakMemory:
    """Largest resident size of this process within a `with` block, in bytes, sampled every 5 ms."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes())
            if self._done.is_set():
                return
            time.sleep(0.005)


def resident_bytes() -> int:
    """Resident size of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell the resident size of a process")
