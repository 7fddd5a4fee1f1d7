"""Makes the tables of latencies and of parity that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from harmonica_rt.demo.measure import Comparison
    from harmonica_rt.parity.report import ParityReport


def latency_table(latency: Comparison) -> Table:
    """Medians and spreads of the rounds in ms, uncached and compiled, and the speed-ups."""
    import torch
    from rich.table import Table

    from harmonica_rt.demo.measure import median, spread

    repeats = len(latency.uncached.pipeline)
    table = Table(
        "", "uncached", "compiled", "speed-up", title=f"median of {repeats} rounds, {torch.get_num_threads()} threads"
    )
    for name, plain, planned, ratio in (
        ("denoiser", latency.uncached.denoiser, latency.compiled.denoiser, latency.denoiser_speedup),
        ("whole pipeline", latency.uncached.pipeline, latency.compiled.pipeline, latency.pipeline_speedup),
    ):
        cells = []
        for seconds in (plain, planned):
            low, high = spread(seconds)
            cells.append(f"{median(seconds) * 1e3:.0f} ms ({low * 1e3:.0f} - {high * 1e3:.0f})")
        table.add_row(name, *cells, f"{ratio:.2f}x")
    table.add_row("theoretical (FLOPs)", "", "", f"{latency.theoretical:.2f}x")
    table.add_row("denoiser, realised / theoretical", "", "", f"{latency.realised:.2f}")
    return table


def parity_table(report: ParityReport) -> Table:
    """One row per step: whether the bits are equal, the errors and what was allowed."""
    from rich.table import Table

    table = Table("step", "same bits", "rms error", "largest error", "allowed (rms, largest)")
    for step in report.steps:
        allowed = f"{step.limit.rms:.3g}, {step.limit.largest:.3g}"
        bits = "yes" if step.same_bits else "no"
        table.add_row(str(step.step), bits, f"{step.error.rms:.3g}", f"{step.error.largest:.3g}", allowed)
    return table
