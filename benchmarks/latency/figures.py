"""Computes the figures of a row from the samples of its provider and of those that it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from benchmarks.latency.measure import Samples
from benchmarks.latency.nvml import summary
from benchmarks.latency.results import GpuState, LatencyRow, Speedups, Times
from benchmarks.timing import Spread


def with_figures(
    row: LatencyRow,
    computes: tuple[bool, ...],
    images: int,
    samples: Mapping[str, Samples],
    name: str,
    peers: Iterable[str],
    no_sensor: str,
) -> LatencyRow:
    """The row with the figures of one provider.

    Args:
        row: with gate, difference and theory.
        computes: for each step, True if the provider computes everything.
        images: images per run.
        samples: samples of all providers of the task; those of `eager` were taken in turn with this provider's, the
            others at other times.
        name: name of the provider in `samples`.
        peers: names of the peers.
        no_sensor: why nothing is known about the GPU; used if there are no samples of its state.
    """
    mine = samples[name]
    gpu = summary(mine.conditions) if mine.conditions else None
    joules = [one.joules for one in mine.conditions if one.joules is not None]
    return dataclasses.replace(
        row,
        work=dataclasses.replace(row.work, computes="".join(str(int(computed)) for computed in computes)),
        times=_times(mine, computes, on_gpu=row.measured.device != "cpu"),
        speedups=_speedups(row, samples, name, [peer for peer in peers if peer in samples]),
        state=GpuState(
            joules_image=Spread.of(joules).p50 / images if joules else None,
            gpu=gpu or no_sensor,
            spoiled=bool(gpu and gpu["throttled_runs"]),
        ),
    )


def _times(mine: Samples, computes: tuple[bool, ...], *, on_gpu: bool) -> Times:
    run = Spread.of(mine.seconds)
    return Times(
        run=run.p50,
        run_p20=run.p20,
        run_p80=run.p80,
        repeats=len(mine.seconds),
        full_step=mine.step_median(computes),
        partial_step=mine.step_median(tuple(not computed for computed in computes)),
        host_step=mine.host_median() if on_gpu else None,
    )


def _speedups(row: LatencyRow, samples: Mapping[str, Samples], name: str, peers: list[str]) -> Speedups:
    mine = samples[name]
    over_eager = _ratios(samples["eager"], mine)
    best = min(peers, key=lambda peer: Spread.of(samples[peer].seconds).p50) if peers else None
    return Speedups(
        vs_eager=over_eager.p50,
        vs_eager_p20=over_eager.p20,
        vs_eager_p80=over_eager.p80,
        vs_graphs=_ratios(samples["reduce-overhead"], mine).p50 if "reduce-overhead" in samples else None,
        vs_best_peer=_ratios(samples[best], mine).p50 if best and row.measured.role == "ours" else None,
        realised=over_eager.p50 / row.work.theory if row.work.theory else None,
    )


def _ratios(base: Samples, mine: Samples) -> Spread:
    return Spread.of([a / b for a, b in zip(base.seconds, mine.seconds, strict=True)])
