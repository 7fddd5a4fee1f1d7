"""What the rows say: a Markdown table, and a plot of realised against theoretical speed-up."""

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
    "host, a step",
    "compile cold, warm",
    "peak memory",
    "energy, an image",
    "off uncached",
    "gate",
)


def table(rows: Sequence[LatencyRow]) -> str:
    """One Markdown table a case and schedule, under a line that says where it was measured."""
    parts = []
    for (case, schedule), group in _groups(rows):
        lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(row) for row in group)]
        title = f"{case}, {schedule}, {group[0].dtype}, {group[0].device}"
        parts.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    if all(row.device == "cpu" for row in rows):
        parts.insert(0, "Measured on a CPU; not measured on a GPU.")
    return "\n\n".join(parts)


def draw(rows: Sequence[LatencyRow], path: Path) -> None:
    """A panel for each case and schedule: bars for the speed-up reached, a mark where theory has it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [(key, [row for row in group if row.vs_eager is not None]) for key, group in _groups(rows)]
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
        axis.set_title(f"{case}\n{schedule}, {group[0].dtype}, {group[0].device}", fontsize=9)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel("speed-up over the eager uncached model; | theoretical; whiskers: 20 and 80 %", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _panel(axis: Axes, rows: list[LatencyRow]) -> None:
    for place, row in enumerate(rows):
        if row.vs_eager is None:
            continue
        low, high = row.vs_eager_p20 or row.vs_eager, row.vs_eager_p80 or row.vs_eager
        axis.barh(
            place,
            row.vs_eager,
            color=COLOURS[row.role],
            alpha=0.3 if row.spoiled else 1.0,
            xerr=[[max(0.0, row.vs_eager - low)], [max(0.0, high - row.vs_eager)]],
            error_kw={"elinewidth": 0.8},
        )
        if row.theory is not None and row.role != "uncached":
            axis.plot([row.theory] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axis.set_yticks(range(len(rows)), [row.provider + " (spoiled)" * row.spoiled for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)


def _cells(row: LatencyRow) -> tuple[str, ...]:
    name = row.provider + (" **(spoiled: throttled)**" if row.spoiled else "")
    if row.reason is not None:
        return (name, row.reason, *[""] * (len(HEADINGS) - 2))
    memory = "" if row.allocated is None or row.reserved is None else f"{_gib(row.allocated)} ({_gib(row.reserved)})"
    compiling = "" if row.alone is None else "failed"
    if row.compile_cold is not None:
        compiling = f"{row.compile_cold:.1f}, {row.compile_warm:.1f} s"
    return (
        name,
        _ratio(row.theory),
        f"{_seconds(row.run)} ({_seconds(row.run_p20)} - {_seconds(row.run_p80)})",
        _ratio(row.vs_eager),
        _ratio(row.vs_graphs),
        _ratio(row.vs_best_peer),
        "" if row.realised is None else f"{row.realised:.2f}",
        _with_floor(row.full_step, row.floor_full),
        _with_floor(row.partial_step, row.floor_partial),
        _seconds(row.host_step),
        compiling,
        memory,
        "" if row.joules_image is None else f"{row.joules_image:.3g} J",
        "" if row.difference is None else f"{row.difference:.2g}",
        row.gate or "",
    )


def _groups(rows: Iterable[LatencyRow]) -> list[tuple[tuple[str, str], list[LatencyRow]]]:
    found: dict[tuple[str, str], list[LatencyRow]] = {}
    for row in rows:
        found.setdefault((row.case, row.schedule), []).append(row)
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
