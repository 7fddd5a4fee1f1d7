"""Shows rows as a table and as a plot of quality against cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quality.matrix import UNCACHED, Row
from harmonica_rt.schedule.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {  # field of a row -> heading, with the direction that is better
    "psnr": "PSNR to uncached, dB (higher is better)",
    "ssim": "SSIM to uncached (higher is better)",
    "frechet_to_uncached": "Frechet distance to uncached, classifier features (lower is better)",
    "frechet_to_real": "Frechet distance to real digits, classifier features (lower is better)",
    "accuracy": "recognised as the requested digit (higher is better)",
}
PLOTTED = {"psnr": "linear", "frechet_to_uncached": "log"}  # metric -> scale
STYLES = {20: "-o", 10: ":s"}  # by steps of the uncached run


@dataclass(frozen=True)
class SeedRange:
    """Mean, minimum and maximum over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> SeedRange:
        """Mean and extremes of at least one value."""
        return cls(statistics.fmean(values), min(values), max(values))

    def __str__(self) -> str:
        spread = f" ({self.low:.4g} - {self.high:.4g})" if self.low != self.high else ""
        return f"{self.mean:.4g}{spread}"


@dataclass(frozen=True)
class Summary:
    """One method at one point, over its seeds.

    Attributes:
        method: name of the method.
        steps: steps of the uncached run.
        target: speed-up that was asked for.
        seeds: number of seeds.
        speedup: theoretical speed-up that was reached.
        metrics: figures by the names of METRICS; without `psnr` if no image differs from its uncached one.
    """

    method: str
    steps: int
    target: float
    seeds: int
    speedup: SeedRange
    metrics: dict[str, SeedRange]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """One summary per method and point, sorted by steps (most first), target and method."""
    groups: dict[tuple[int, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((-row["steps"], row["target_speedup"], row["method"]), []).append(row)
    return [
        Summary(
            method,
            -steps,
            target,
            len(group),
            SeedRange.of([row["speedup"] for row in group]),
            {
                name: SeedRange.of(values)
                for name in METRICS
                if (values := [row[name] for row in group if row[name] is not None])
            },
        )
        for (steps, target, method), group in sorted(groups.items())
    ]


def table(summaries: Iterable[Summary]) -> str:
    """A Markdown table with mean (min - max) over the seeds."""
    names = ["method", "steps", "speed-up", "seeds", *METRICS]
    lines = [names, ["---"] * len(names)]
    for one in summaries:
        figures = [str(one.metrics.get(name, "-")) for name in METRICS]
        lines.append([one.method, str(one.steps), str(one.speedup), str(one.seeds), *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(summaries: Iterable[Summary], path: Path) -> None:
    """Plot PSNR and Frechet distance against the speed-up, with one colour per method and one style per step count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in summaries if one.method != UNCACHED]
    methods = sorted({one.method for one in shown})
    figure = Figure(figsize=(11, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, scale) in zip(figure.subplots(1, len(PLOTTED)), PLOTTED.items(), strict=True):
        for index, method in enumerate(methods):
            for steps, style in STYLES.items():
                _line(axis, [one for one in shown if (one.method, one.steps) == (method, steps)], metric, style, index)
        axis.set_yscale(scale)
        axis.set_xlabel("theoretical speed-up (squares: over 10 steps, else over 20)")
        axis.set_title(METRICS[metric], fontsize=9)
        axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _line(axis: Axes, points: list[Summary], metric: str, style: str, colour: int) -> None:
    points = sorted((one for one in points if metric in one.metrics), key=lambda one: one.speedup.mean)
    if not points:
        return
    spreads = [one.metrics[metric] for one in points]
    axis.errorbar(
        [one.speedup.mean for one in points],
        [spread.mean for spread in spreads],
        yerr=[[s.mean - s.low for s in spreads], [s.high - s.mean for s in spreads]],
        fmt=style,
        color=f"C{colour}",
        markersize=4,
        capsize=2,
        label=points[0].method if points[0].steps == 20 else None,
    )
