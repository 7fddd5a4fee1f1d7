"""Measure the chosen providers on the chosen cases: gate, runs in turn, steps, floors, and what each takes alone."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.latency.alone import RECOMPILES, Spec, measure_apart
from benchmarks.latency.cases import Task, case_of, geometries, schedules_of
from benchmarks.latency.floor import floors
from benchmarks.latency.gate import Truth, gate, outputs_of, relative_rms, truth_of
from benchmarks.latency.measure import Samples, clock_of, interleave, use
from benchmarks.latency.nvml import open_sensor
from benchmarks.latency.providers import PROVIDERS
from benchmarks.latency.providers.base import Provider, Runner
from benchmarks.latency.results import LatencyRow, measured
from harmonica_rt.errors import HarmonicaError

WARM_UPS = 3  # whole runs: forecasts are made of the first, graphs recorded in those after it
FAILURES = (  # of a provider; what is the code of others may fail in any way, and stands in its row
    HarmonicaError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, StopIteration
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        models: names of geometries.
        images: batches, in images.
        schedules: names; those that do not fit a model are left out for it.
        providers: names of providers; `eager` is always among them.
        steps, repeats: of a run; of each timing.
        device, dtype: where.
        flux_blocks: double and single.
        alone: measure compiling and memory, each provider in a process of its own.
        floor: time the products of each step alone.
    """

    models: tuple[str, ...]
    images: tuple[int, ...]
    schedules: tuple[str, ...]
    providers: tuple[str, ...]
    steps: int
    repeats: int
    device: torch.device
    dtype: torch.dtype
    flux_blocks: tuple[int, int] = (19, 38)
    alone: bool = False
    floor: bool = False

    @property
    def chosen(self) -> dict[str, Provider]:
        """The providers, in the order of PROVIDERS."""
        return {name: PROVIDERS[name] for name in PROVIDERS if name == "eager" or name in self.providers}


def run(settings: Settings) -> Iterator[LatencyRow]:
    """Rows of every case and schedule, as each is done."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    use(settings.device)
    known = geometries(settings.flux_blocks)
    for model in settings.models:
        for images in settings.images:
            case = case_of(known[model], images, settings.steps, settings.device, settings.dtype)
            schedules = schedules_of(case.model, settings.steps)
            for name in settings.schedules:
                if name in schedules:
                    found = _task_that_fits(Task(case, name, schedules[name]), settings)
                    yield from (_alone(row, key, model, settings, images) for key, row in found.items())


def _task_that_fits(task: Task, settings: Settings) -> dict[str, LatencyRow]:
    """`measure_task`, or rows that say that the memory was too small for the model itself."""
    try:
        return measure_task(task, settings)
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {_first_line(error)}"
        chosen = settings.chosen.items()
        return {name: dataclasses.replace(_blank(task, provider), reason=reason) for name, provider in chosen}


def measure_task(
    task: Task, settings: Settings, providers: Mapping[str, Provider] | None = None
) -> dict[str, LatencyRow]:
    """Rows by the name of the provider, all but what is measured in processes of their own.

    Args:
        task: the case and its schedule.
        settings: how.
        providers: in the place of those that the settings choose; `eager` must be among them.
    """
    chosen = settings.chosen if providers is None else dict(providers)
    rows: dict[str, LatencyRow] = {}
    done: dict[str, _Measured] = {}
    truth = truth_of(task)
    _release(task.case.device)  # the reference one precision up may be most of the memory
    uncached: list[Tensor] = []
    sensor, no_sensor = open_sensor(task.case.device)
    eager = chosen["eager"].prepare(task)
    names = ["eager", *(name for name in chosen if name != "eager")]
    try:
        for name in names:
            provider = chosen[name]
            row, reason, runner = _blank(task, provider), provider.applies(task), None
            if reason is None:
                try:
                    runner = eager if name == "eager" else provider.prepare(task)
                    row = _checked(row, provider, runner, truth, uncached)
                    pair = {"eager": eager, name: runner}
                    done[name] = _Measured(
                        runner.computes, interleave(pair, settings.repeats, clock_of(task.case.device), sensor)
                    )
                except FAILURES as error:
                    if name == "eager":
                        raise  # all others are measured against it
                    reason = f"{type(error).__name__}: {_first_line(error)}"
                finally:
                    if runner is not None and runner is not eager:
                        runner.close()
                    runner = None
                    if name != "eager":
                        torch.compiler.reset()
                    _release(task.case.device)  # the next one finds the memory as this one did
            rows[name] = dataclasses.replace(row, reason=reason)
    finally:
        eager.close()
        torch.compiler.reset()
        _release(task.case.device)
    limits = np.array(floors(task)) if settings.floor else None
    peers = [name for name in done if chosen[name].role == "peer"]
    samples = {name: one.samples[name] for name, one in done.items()}
    for name, one in done.items():
        known = {**samples, "eager": one.samples["eager"]}
        row = measured(rows[name], one.computes, task.case.images, known, name, peers, no_sensor)
        rows[name] = _with_floors(row, one.computes, limits) if row.role in ("hooks", "ours") else row
    return {name: rows[name] for name in chosen}


@dataclass(frozen=True)
class _Measured:
    """One provider, run in turn with `eager`: whether each of its steps computes everything, and both their samples."""

    computes: tuple[bool, ...]
    samples: dict[str, Samples]


def _release(device: torch.device) -> None:
    """Give memory back that nothing refers to: compiled models refer to themselves, and processes share a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _blank(task: Task, provider: Provider) -> LatencyRow:
    case = task.case
    device = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else case.device.type
    dtype = str(case.dtype).removeprefix("torch.")
    return LatencyRow(case.name, task.schedule_name, case.steps, provider.name, provider.role, device, dtype)


def _checked(row: LatencyRow, provider: Provider, runner: Runner, truth: Truth, uncached: list[Tensor]) -> LatencyRow:
    """The row with gate, difference and theory: held against the reference in its first run, and once it is warm.

    Raises:
        GateError: its outputs are off.
    """
    device = runner.task.case.device
    gate(provider.role, truth, outputs_of(runner), device)
    for _ in range(WARM_UPS):
        runner.run()
    outputs = outputs_of(runner)
    held = gate(provider.role, truth, outputs, device)
    if not uncached:
        uncached.extend(outputs)  # the first is eager
    return dataclasses.replace(row, gate=held, difference=relative_rms(outputs, uncached), theory=runner.theory())


def _with_floors(row: LatencyRow, computes: tuple[bool, ...], limits: Any) -> LatencyRow:
    if limits is None:
        return row
    full = np.array(computes)
    full[0] = False  # it is not in the median of the steps either
    partial = ~np.array(computes)
    return dataclasses.replace(
        row,
        floor_full=float(np.median(limits[full])) if full.any() else None,
        floor_partial=float(np.median(limits[partial])) if partial.any() else None,
    )


def _alone(row: LatencyRow, provider: str, model: str, settings: Settings, images: int) -> LatencyRow:
    if not settings.alone or row.reason is not None or row.computes is None:
        return row
    dtype = str(settings.dtype).removeprefix("torch.")
    spec = Spec(
        model,
        images,
        settings.steps,
        row.schedule,
        provider,
        str(settings.device),
        dtype,
        settings.flux_blocks,
        tuple(step == "1" for step in row.computes),
    )
    try:
        cold, warm = measure_apart(spec)
    except RuntimeError as error:
        return dataclasses.replace(row, alone=str(error))
    return dataclasses.replace(
        row,
        compile_cold=cold.compile_seconds,
        compile_warm=warm.compile_seconds,
        allocated=warm.allocated,
        reserved=warm.reserved,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
