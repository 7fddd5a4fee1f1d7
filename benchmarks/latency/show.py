"""Shows rows as a Markdown table and as a plot of realised and theoretical speed-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.latency.results import LatencyRow
from harmonica_rt.schedule.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"uncached": "0.6", "hooks": "C1", "peer": "C0", "ours": "C2"}
HEADINGS = (
    "provider",
    "theory",
    "run",
    "vs eager",
    "vs CUDA graphs",
    "vs best peer",
    "realised / theory",
    "full step (floor)",
    "partial step (floor)",
    "host, per step",
    "compile cold, warm",
    "peak memory",
    "energy, per image",
    "difference from uncached",
    "gate",
)


def table(rows: Sequence[LatencyRow]) -> str:
    """One Markdown table per case and schedule, under a line that says where it was measured."""
    parts = []
    for (case, schedule), group in _groups(rows):
        lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(row) for row in group)]
        title = f"{case}, {schedule}, {group[0].measured.dtype}, {group[0].measured.device}"
        parts.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    if all(row.measured.device == "cpu" for row in rows):
        parts.insert(0, "Measured on a CPU; not measured on a GPU.")
    return "\n\n".join(parts)


def draw(rows: Sequence[LatencyRow], path: Path) -> None:
    """Draw one panel per case and schedule: bars for the realised speed-up, marks for the theoretical one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [(key, [row for row in group if row.speedups.vs_eager is not None]) for key, group in _groups(rows)]
    groups = [(key, group) for key, group in groups if group]
    if not groups:
        return
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    tallest = max(len(group) for _, group in groups)
    figure = Figure(figsize=(6 * columns, lines * (1.2 + 0.3 * tallest)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, ((case, schedule), group) in zip(axes, groups, strict=False):
        _panel(axis, group)
        axis.set_title(f"{case}\n{schedule}, {group[0].measured.dtype}, {group[0].measured.device}", fontsize=9)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel(
        "speed-up over the eager uncached model; | theoretical; whiskers: 20th and 80th percentile", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _panel(axis: Axes, rows: list[LatencyRow]) -> None:
    for place, row in enumerate(rows):
        reached, speedups = row.speedups.vs_eager, row.speedups
        if reached is None:
            continue
        low, high = speedups.vs_eager_p20 or reached, speedups.vs_eager_p80 or reached
        axis.barh(
            place,
            reached,
            color=COLOURS[row.measured.role],
            alpha=0.3 if row.state.spoiled else 1.0,
            xerr=[[max(0.0, reached - low)], [max(0.0, high - reached)]],
            error_kw={"elinewidth": 0.8},
        )
        theory = row.work.theory
        if theory is not None and row.measured.role != "uncached":
            axis.plot([theory] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axis.set_yticks(
        range(len(rows)), [row.measured.provider + " (spoiled)" * row.state.spoiled for row in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)


def _cells(row: LatencyRow) -> tuple[str, ...]:
    name = row.measured.provider + (" **(spoiled: throttled)**" if row.state.spoiled else "")
    if row.reason is not None:
        return (name, row.reason, *[""] * (len(HEADINGS) - 2))
    work, times, speedups, own = row.work, row.times, row.speedups, row.own_process
    memory = "" if own.allocated is None or own.reserved is None else f"{_gib(own.allocated)} ({_gib(own.reserved)})"
    compiling = "" if own.alone is None else "failed"
    if own.compile_cold is not None:
        compiling = f"{own.compile_cold:.1f}, {own.compile_warm:.1f} s"
    return (
        name,
        _ratio(work.theory),
        f"{_seconds(times.run)} ({_seconds(times.run_p20)} - {_seconds(times.run_p80)})",
        _ratio(speedups.vs_eager),
        _ratio(speedups.vs_graphs),
        _ratio(speedups.vs_best_peer),
        "" if speedups.realised is None else f"{speedups.realised:.2f}",
        _with_floor(times.full_step, row.floors.floor_full),
        _with_floor(times.partial_step, row.floors.floor_partial),
        _seconds(times.host_step),
        compiling,
        memory,
        "" if row.state.joules_image is None else f"{row.state.joules_image:.3g} J",
        "" if work.difference is None else f"{work.difference:.2g}",
        work.gate or "",
    )


def _groups(rows: Iterable[LatencyRow]) -> list[tuple[tuple[str, str], list[LatencyRow]]]:
    found: dict[tuple[str, str], list[LatencyRow]] = {}
    for row in rows:
        found.setdefault((row.measured.case, row.measured.schedule), []).append(row)
    return list(found.items())


def _with_floor(seconds: float | None, floor: float | None) -> str:
    return _seconds(seconds) + (f" ({_seconds(floor)})" if seconds is not None and floor is not None else "")


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"
