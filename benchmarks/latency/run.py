"""Measures the chosen providers on the chosen cases: gate, runs in turn, steps, floors, each in its own process."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.latency.alone import RECOMPILES, Spec, measure_apart
from benchmarks.latency.cases import Task, case_of, geometries, schedules_of
from benchmarks.latency.figures import with_figures
from benchmarks.latency.floor import floors
from benchmarks.latency.gate import Truth, gate, outputs_of, relative_rms, truth_of
from benchmarks.latency.measure import Samples, clock_of, interleave, use
from benchmarks.latency.nvml import open_sensor
from benchmarks.latency.providers.base import Provider, Runner
from benchmarks.latency.results import Floors, InOwnProcess, LatencyRow, Measured, Work
from benchmarks.latency.settings import Selection, Settings
from harmonica_rt.errors import HarmonicaError

WARM_UPS = 3  # whole runs: timesteps become known in the first, and graphs are recorded in those after it
FAILURES = (  # foreign code may fail in any of these ways; the error becomes the reason in the provider's row
    HarmonicaError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, StopIteration
)  # fmt: skip


class _Timed(NamedTuple):
    """One provider that ran in turn with `eager`: its step mask, and the samples of both."""

    computes: tuple[bool, ...]
    samples: dict[str, Samples]


def run(selection: Selection, settings: Settings) -> Iterator[LatencyRow]:
    """Yield the rows of every case and schedule, as each is done."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    use(settings.device)
    known = geometries(selection.flux_blocks)
    for model in selection.models:
        for images in selection.images:
            case = case_of(known[model], images, settings.steps, settings.device, settings.dtype)
            schedules = schedules_of(case.model, settings.steps)
            for name in selection.schedules:
                if name not in schedules:
                    continue
                found = _task_that_fits(Task(case, name, schedules[name]), settings, selection.chosen)
                for provider, row in found.items():
                    yield _with_own_process(row, provider, model, images, selection, settings)


def _task_that_fits(task: Task, settings: Settings, providers: Mapping[str, Provider]) -> dict[str, LatencyRow]:
    """`measure_task`, or rows that say that the memory is too small for the model itself."""
    try:
        return measure_task(task, settings, providers)
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {_first_line(error)}"
        return {name: LatencyRow(_measured(task, provider), reason) for name, provider in providers.items()}


def measure_task(task: Task, settings: Settings, providers: Mapping[str, Provider]) -> dict[str, LatencyRow]:
    """Rows by the name of the provider, without what is measured in processes of their own.

    Args:
        task: the case and its schedule.
        settings: how to measure.
        providers: the providers by name; `eager` must be one of them.
    """
    rows: dict[str, LatencyRow] = {}
    done: dict[str, _Timed] = {}
    truth = truth_of(task)
    _release(task.case.device)  # the reference one precision up may fill most of the memory
    uncached: list[Tensor] = []
    sensor, no_sensor = open_sensor(task.case.device)
    eager = providers["eager"].prepare(task)
    names = ["eager", *(name for name in providers if name != "eager")]
    try:
        for name in names:
            provider = providers[name]
            row, reason, runner = LatencyRow(_measured(task, provider)), provider.applies(task), None
            if reason is None:
                try:
                    runner = eager if name == "eager" else provider.prepare(task)
                    row = _checked(row, provider, runner, truth, uncached)
                    pair = {"eager": eager, name: runner}
                    samples = interleave(pair, settings.repeats, clock_of(task.case.device), sensor)
                    done[name] = _Timed(runner.computes, samples)
                except FAILURES as error:
                    if name == "eager":
                        raise  # all others are compared with it
                    reason = f"{type(error).__name__}: {_first_line(error)}"
                finally:
                    if runner is not None and runner is not eager:
                        runner.close()
                    runner = None
                    if name != "eager":
                        torch.compiler.reset()
                    _release(task.case.device)  # so that the next provider finds as much memory as this one
            rows[name] = dataclasses.replace(row, reason=reason)
    finally:
        eager.close()
        torch.compiler.reset()
        _release(task.case.device)
    limits = np.array(floors(task)) if settings.floor else None
    peers = [name for name in done if providers[name].role == "peer"]
    own_samples = {name: one.samples[name] for name, one in done.items()}
    for name, one in done.items():
        known = {**own_samples, "eager": one.samples["eager"]}
        row = with_figures(rows[name], one.computes, task.case.images, known, name, peers, no_sensor)
        rows[name] = _with_floors(row, one.computes, limits) if row.measured.role in ("hooks", "ours") else row
    return {name: rows[name] for name in providers}


def _release(device: torch.device) -> None:
    """Free memory that nothing refers to: compiled models are in reference cycles, and processes share a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measured(task: Task, provider: Provider) -> Measured:
    case = task.case
    device = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else case.device.type
    dtype = str(case.dtype).removeprefix("torch.")
    return Measured(case.name, task.schedule_name, case.steps, provider.name, provider.role, device, dtype)


def _checked(row: LatencyRow, provider: Provider, runner: Runner, truth: Truth, uncached: list[Tensor]) -> LatencyRow:
    """The row with gate, difference and theory. Outputs are checked in the first run, and again after the warm-ups.

    Raises:
        GateError: its outputs differ too much.
    """
    device = runner.task.case.device
    gate(provider.role, truth, outputs_of(runner), device)
    for _ in range(WARM_UPS):
        runner.run()
    outputs = outputs_of(runner)
    held = gate(provider.role, truth, outputs, device)
    if not uncached:
        uncached.extend(outputs)  # the first provider is eager
    return dataclasses.replace(
        row, work=Work(gate=held, difference=relative_rms(outputs, uncached), theory=runner.theory())
    )


def _with_floors(row: LatencyRow, computes: tuple[bool, ...], limits: NDArray[np.float64] | None) -> LatencyRow:
    """The row with the medians of `limits` [steps], seconds, over its full and its partial steps."""
    if limits is None:
        return row
    full, partial = np.array(computes), ~np.array(computes)
    full[0] = False  # the medians of the steps leave it out too
    medians = [float(np.median(limits[chosen])) if chosen.any() else None for chosen in (full, partial)]
    return dataclasses.replace(row, floors=Floors(*medians))


def _with_own_process(
    row: LatencyRow, provider: str, model: str, images: int, selection: Selection, settings: Settings
) -> LatencyRow:
    """The row with compile time and memory, if they are wanted and the provider runs."""
    if not settings.alone or row.reason is not None or row.work.computes is None:
        return row
    spec = Spec(
        model=model,
        images=images,
        steps=settings.steps,
        schedule=row.measured.schedule,
        provider=provider,
        device=str(settings.device),
        dtype=str(settings.dtype).removeprefix("torch."),
        flux_blocks=selection.flux_blocks,
        computes=tuple(step == "1" for step in row.work.computes),
    )
    try:
        cold, warm = measure_apart(spec)
    except RuntimeError as error:
        return dataclasses.replace(row, own_process=InOwnProcess(alone=str(error)))
    found = InOwnProcess(
        compile_cold=cold.compile_seconds,
        compile_warm=warm.compile_seconds,
        allocated=warm.allocated,
        reserved=warm.reserved,
    )
    return dataclasses.replace(row, own_process=found)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
