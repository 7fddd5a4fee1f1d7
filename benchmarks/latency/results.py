"""The rows of the latency benchmark: all that was measured per case, schedule and provider, or why nothing was.

In memory a row is a record of records; on disk it is flat, and a field that is None is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.latency.providers.base import Role


@dataclass(frozen=True)
class Measured:
    """What a row is about: one provider on one case under one schedule.

    Attributes:
        case: model, geometry and batch.
        schedule: name of the schedule.
        steps: steps per run.
        provider: name of the provider.
        role: its role; see `providers.base`.
        device: name of the GPU, or `cpu`.
        dtype: dtype of the parameters.
    """

    case: str
    schedule: str
    steps: int
    provider: str
    role: Role
    device: str
    dtype: str


@dataclass(frozen=True)
class Work:
    """What the provider computed, and how that compares.

    Attributes:
        gate: result of the comparison with the reference, or a note that none is required.
        difference: RMS of the difference from the uncached run's outputs / RMS of those outputs.
        computes: one digit per step, 1 for a step that computes everything.
        theory: theoretical speed-up, FLOPs of an uncached run / FLOPs of this one.
    """

    gate: str | None = None
    difference: float | None = None
    computes: str | None = None
    theory: float | None = None


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        run: median of whole runs.
        run_p20: 20th percentile of whole runs.
        run_p80: 80th percentile of whole runs.
        repeats: number of runs.
        full_step: median of the steps that compute everything.
        partial_step: median of the other steps.
        host_step: median time until a step's call returned, its work still in progress; on a GPU only.
    """

    run: float | None = None
    run_p20: float | None = None
    run_p80: float | None = None
    repeats: int = 0
    full_step: float | None = None
    partial_step: float | None = None
    host_step: float | None = None


@dataclass(frozen=True)
class Speedups:
    """Realised speed-ups: medians of the ratios per round; above 1 is faster.

    Attributes:
        vs_eager: over the uncached eager model.
        vs_eager_p20: its 20th percentile.
        vs_eager_p80: its 80th percentile.
        vs_graphs: over the uncached model under torch.compile's `reduce-overhead`.
        vs_best_peer: over the fastest peer (whose theoretical speed-up is not higher); for our providers only.
        realised: vs_eager / theory.
    """

    vs_eager: float | None = None
    vs_eager_p20: float | None = None
    vs_eager_p80: float | None = None
    vs_graphs: float | None = None
    vs_best_peer: float | None = None
    realised: float | None = None


@dataclass(frozen=True)
class Floors:
    """Seconds that no step can go below; see `floor`.

    Attributes:
        floor_full: for steps that compute everything.
        floor_partial: for the other steps.
    """

    floor_full: float | None = None
    floor_partial: float | None = None


@dataclass(frozen=True)
class InOwnProcess:
    """What was measured with the provider in its own process; see `alone`.

    Attributes:
        alone: why the rest is unknown, if that measurement failed.
        compile_cold: seconds to compile with empty caches on disk.
        compile_warm: seconds to compile with full caches on disk.
        allocated: peak bytes of GPU memory in use.
        reserved: peak bytes of GPU memory that the allocator held.
    """

    alone: str | None = None
    compile_cold: float | None = None
    compile_warm: float | None = None
    allocated: int | None = None
    reserved: int | None = None


@dataclass(frozen=True)
class GpuState:
    """What the GPU did during the runs.

    Attributes:
        joules_image: energy per image, in joules.
        gpu: clocks, temperature and throttling before and after every run, or why they are unknown.
        spoiled: True if a run was throttled, so that the figures do not count.
    """

    joules_image: float | None = None
    gpu: Mapping[str, Any] | str | None = None
    spoiled: bool = False


@dataclass(frozen=True)
class LatencyRow:
    """One row.

    Attributes:
        measured: case, schedule and provider.
        reason: why there are no figures; None if there are.
        work: what was computed.
        times: seconds of runs and steps.
        speedups: realised speed-ups.
        floors: lower bounds of the times of steps.
        own_process: compile time and memory.
        state: state of the GPU.
    """

    measured: Measured
    reason: str | None = None
    work: Work = field(default_factory=Work)
    times: Times = field(default_factory=Times)
    speedups: Speedups = field(default_factory=Speedups)
    floors: Floors = field(default_factory=Floors)
    own_process: InOwnProcess = field(default_factory=InOwnProcess)
    state: GpuState = field(default_factory=GpuState)


# Fields of a row that are records themselves. On disk their fields stand in the row, in this order; names are unique.
_PARTS: dict[str, type[Any]] = {
    "measured": Measured,
    "work": Work,
    "times": Times,
    "speedups": Speedups,
    "floors": Floors,
    "own_process": InOwnProcess,
    "state": GpuState,
}


def flat(row: LatencyRow) -> dict[str, Any]:
    """All fields of a row by their names on disk."""
    found: dict[str, Any] = {}
    for name, value in dataclasses.asdict(row).items():
        found |= value if name in _PARTS else {name: value}
    return found


def row_of(fields: Mapping[str, Any]) -> LatencyRow:
    """The row that `flat` gave, from the fields that are not None.

    Raises:
        TypeError: a field is unknown, or one without a default is missing.
    """
    left = dict(fields)
    parts = {
        name: cls(**{key.name: left.pop(key.name) for key in dataclasses.fields(cls) if key.name in left})
        for name, cls in _PARTS.items()
    }
    return LatencyRow(**parts, **left)


def save(found: Iterable[LatencyRow], path: Path) -> None:
    """Write rows, which replace those of the same case, schedule, steps, provider, device and dtype in the file."""
    key = ("case", "schedule", "steps", "provider", "device", "dtype")
    rows.merge(path, [rows.short(flat(row)) for row in found], key)


def read(path: Path) -> list[LatencyRow]:
    """The rows of a file."""
    return [row_of({name: value for name, value in row.items() if name != "machine"}) for row in rows.read(path)]
