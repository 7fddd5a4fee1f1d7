"""Rows: one for each case, schedule and provider, with all that was measured, or why it was not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.latency.measure import Samples
from benchmarks.latency.nvml import summary
from benchmarks.latency.providers.base import Role
from benchmarks.timing import Spread


@dataclass(frozen=True)
class LatencyRow:
    """One provider on one case under one schedule. Seconds, bytes, joules; ratios above 1 are faster.

    Attributes:
        case, schedule, steps, provider, role: which.
        device, dtype: where.
        reason: why there are no figures; None where there are.
        gate: what held against the reference, or that nothing is demanded of it.
        difference: RMS of the difference to the uncached run's outputs / RMS of those.
        computes: a digit a step, 1 where it computes everything.
        theory: theoretical speed-up, FLOPs of an uncached run / FLOPs of this one.
        run, run_p20, run_p80: seconds of the denoising, median and spread.
        repeats: how many runs.
        full_step, partial_step: median seconds of steps that compute everything, and of the others.
        host_step: median seconds until a step's call returned, its work under way; on a GPU only.
        vs_eager, vs_graphs, vs_best_peer: realised speed-up against eager uncached, torch.compile's reduce-overhead
            uncached, and the fastest peer (of no more theoretical speed-up); medians over rounds.
        realised: vs_eager / theory.
        floor_full, floor_partial: seconds that no such step can go below; see `floor`.
        alone: why what is measured in a process of its own (the next four) is not known, where that failed.
        compile_cold, compile_warm: seconds.
        allocated, reserved: peak bytes of GPU memory.
        joules_image: energy of an image.
        gpu: clocks, temperature and throttling at both ends of every run, or why they are not known.
        spoiled: runs were throttled: the figures do not count.
    """

    case: str
    schedule: str
    steps: int
    provider: str
    role: Role
    device: str
    dtype: str
    reason: str | None = None
    gate: str | None = None
    difference: float | None = None
    computes: str | None = None
    theory: float | None = None
    run: float | None = None
    run_p20: float | None = None
    run_p80: float | None = None
    repeats: int = 0
    full_step: float | None = None
    partial_step: float | None = None
    host_step: float | None = None
    vs_eager: float | None = None
    vs_eager_p20: float | None = None
    vs_eager_p80: float | None = None
    vs_graphs: float | None = None
    vs_best_peer: float | None = None
    realised: float | None = None
    floor_full: float | None = None
    floor_partial: float | None = None
    alone: str | None = None
    compile_cold: float | None = None
    compile_warm: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    joules_image: float | None = None
    gpu: Mapping[str, Any] | str | None = None
    spoiled: bool = False


def measured(
    row: LatencyRow,
    computes: tuple[bool, ...],
    images: int,
    samples: Mapping[str, Samples],
    name: str,
    peers: Iterable[str],
    no_sensor: str,
) -> LatencyRow:
    """The row with the figures of one runner.

    Args:
        row: with which, gate, difference and theory.
        computes: whether each step of the runner computes everything.
        images: that one run makes.
        samples: of all runners of the task, and of `eager` as it ran in turn with this one.
        name: of the runner.
        peers: names of those that cache by another method.
        no_sensor: why nothing is known of the GPU, where nothing is.
    """
    mine = samples[name]
    time, speedup = Spread.of(mine.seconds), _ratios(samples["eager"], mine)
    others = [peer for peer in peers if peer in samples]
    best = min(others, key=lambda peer: Spread.of(samples[peer].seconds).p50) if others else None
    gpu = summary(mine.conditions) if mine.conditions else None
    joules = [one.joules for one in mine.conditions if one.joules is not None]
    partial = tuple(not computed for computed in computes)
    return dataclasses.replace(
        row,
        computes="".join(str(int(computed)) for computed in computes),
        run=time.p50,
        run_p20=time.p20,
        run_p80=time.p80,
        repeats=len(mine.seconds),
        full_step=mine.step_median(computes),
        partial_step=mine.step_median(partial),
        host_step=mine.host_median() if row.device != "cpu" else None,
        vs_eager=speedup.p50,
        vs_eager_p20=speedup.p20,
        vs_eager_p80=speedup.p80,
        vs_graphs=_ratios(samples["reduce-overhead"], mine).p50 if "reduce-overhead" in samples else None,
        vs_best_peer=_ratios(samples[best], mine).p50 if best and row.role == "ours" else None,
        realised=speedup.p50 / row.theory if row.theory else None,
        joules_image=Spread.of(joules).p50 / images if joules else None,
        gpu=gpu or no_sensor,
        spoiled=bool(gpu and gpu["throttled_runs"]),
    )


def save(found: Iterable[LatencyRow], path: Path) -> None:
    """Write the rows beside those of other cases, schedules and providers that the file has."""
    rows.merge(path, [rows.short(row) for row in found], ("case", "schedule", "steps", "provider", "device", "dtype"))


def read(path: Path) -> list[LatencyRow]:
    """The rows of a file."""
    fields = ({k: v for k, v in row.items() if k != "machine"} for row in json.loads(path.read_text())["rows"])
    return [LatencyRow(**row) for row in fields]


def _ratios(base: Samples, mine: Samples) -> Spread:
    return Spread.of([a / b for a, b in zip(base.seconds, mine.seconds, strict=True)])
