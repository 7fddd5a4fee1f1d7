"""The heat map of a schedule: steps from top to bottom, sites from left to right, CUR and weights of each step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.files import save_figure
from harmonica_rt.schedule.panels import Panel, panels_of, weights_of_entries
from harmonica_rt.untrusted.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDEST, _HIGHEST = 40.0, 100.0  # inches of a heat map; a larger one is scaled down
_COMPUTE, _REUSE, _INK, _PAPER = "#27476e", "#f6d8a8", "#2b2b2b", "white"
_WEIGHTED = ("#f2b36b", "#e8894a", "#d4603a", "#b03a34")  # reused with 1, 2, 3, 4 weights


def plot(schedule: ScheduleData, path: str | os.PathLike[str] | None = None) -> Figure:
    """The schedule as a heat map, with the CUR per step on the right; see `Schedule.plot`.

    Uses matplotlib's object interface: no pyplot, no global state, no display.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    panels, steps = panels_of(schedule.sites), schedule.steps
    sites = len(schedule.sites)
    cell_w = min(max(9.5 / sites, 0.062), 0.3)  # inches
    cell_h = min(max(6.0 / steps, 0.13), 0.3)
    sides = [1.1] if schedule.weights is None else [1.1, 1.7]  # inches of CUR and weights
    long_labels = max(len(label) for panel in panels for label in panel.labels) > 5
    # no panel is narrower than its title needs
    widths = [max(cell_w * len(panel.columns), 0.09 * len(panel.title) + 0.2) for panel in panels]
    made = f"  ·  {one_line(schedule.made_by.method)}" if schedule.made_by else ""
    title = f"CUR {schedule.cur:.2%}  ·  {steps} steps x {sites} sites{made}"
    width = max(sum(widths) + sum(sides) + 0.25 * len(panels) + 1.1, 0.125 * len(title))
    height = cell_h * steps + (2.9 if long_labels else 1.9)
    figure = Figure(
        figsize=(min(width, _WIDEST), min(height, _HIGHEST)),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
        facecolor=_PAPER,
    )
    axes = figure.subplots(
        1, len(panels) + len(sides), sharey=True, squeeze=False, gridspec_kw={"width_ratios": [*widths, *sides]}
    )[0]
    for panel, axis, inches in zip(panels, axes, widths, strict=False):
        _draw_panel(axis, schedule, panel, inches)
    _draw_bars(axes[len(panels)], schedule)
    if schedule.weights is not None:
        _draw_weights(axes[-1], schedule)
    axes[0].set_ylim(steps, 0)
    stride = _stride(steps, 25)
    axes[0].set_yticks(np.arange(0, steps, stride) + 0.5, [str(s) for s in range(0, steps, stride)])
    axes[0].set_ylabel("step", color=_INK)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK, parse_math=False)
    handles = [Patch(facecolor=_COMPUTE, label="compute"), Patch(facecolor=_REUSE, label="reuse")]
    for count in sorted(set(weights_of_entries(schedule).flat) - {0}):
        label = f"reuse, {count} weight{'s' if count > 1 else ''}"
        handles.append(Patch(facecolor=_WEIGHTED[count - 1], label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    if path is not None:
        save_figure(figure, path, dpi=160)
    return figure


def _draw_panel(axis: Axes, schedule: ScheduleData, panel: Panel, inches: float) -> None:
    from matplotlib.colors import ListedColormap

    count = len(panel.columns)
    colours = [_REUSE, *_WEIGHTED, _COMPUTE]
    entries = np.where(schedule.compute, len(colours) - 1, weights_of_entries(schedule))
    axis.pcolormesh(
        entries[:, panel.columns].astype(np.float64),
        cmap=ListedColormap(colours), vmin=0.0, vmax=len(colours) - 1.0,
        edgecolors=_PAPER, linewidth=min(0.8, 6 * inches / count),
    )  # fmt: skip
    cur = 1.0 - schedule.compute[:, panel.columns].mean()
    axis.set_title(f"{panel.title}\n{cur:.1%}", fontsize=10, color=_INK, parse_math=False)
    size = 7
    upright = max(map(len, panel.labels)) > 3
    room = inches * 72 / (size * 1.3 if upright else size * 0.75 * max(map(len, panel.labels)) + 3)
    stride = _stride(count, int(room))
    ticks = range(0, count, stride)
    axis.set_xticks(
        np.array(ticks) + 0.5,
        [panel.labels[i] for i in ticks],
        fontsize=size,
        rotation=90 if upright else 0,
        parse_math=False,  # a name with two dollar signs is a name
    )
    axis.set_xlabel(panel.axis, fontsize=8, color=_INK)
    _strip(axis)


def _draw_bars(axis: Axes, schedule: ScheduleData) -> None:
    shares = schedule.cur_per_step()
    axis.barh(np.arange(schedule.steps) + 0.5, shares, height=0.8, color=_REUSE)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.5, 1], ["0", "50", "100 %"], fontsize=7)
    axis.set_title("CUR\nper step", fontsize=10, color=_INK)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    _strip(axis)


def _draw_weights(axis: Axes, schedule: ScheduleData) -> None:
    """Each weight of each step: a mark where the sites have it, and a line where they differ."""
    weights, marks = schedule.entry_weights, "os^v"
    for place in range(schedule.most_weights):
        colour = _WEIGHTED[-1 - place]
        for step in np.flatnonzero(~schedule.compute.all(axis=1)):
            own = np.unique(weights[step, ~schedule.compute[step], place])
            if own.any():
                axis.plot(own, [step + 0.5] * len(own), marks[place], color=colour, markersize=3, linestyle="-")
    axis.axvline(0.0, color="#c9c9c9", linewidth=0.6, zorder=0)
    axis.set_title("weights\n" + " ".join("●■▲▼"[: schedule.most_weights]), fontsize=10, color=_INK)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("newest value first", fontsize=8, color=_INK)
    _strip(axis)


def _stride(count: int, room: int) -> int:
    """The smallest of 1, 2, 5, 10, ... that leaves at most `room` of `count` ticks."""
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if s >= count or count <= s * room)


def _strip(axis: Axes) -> None:
    axis.tick_params(length=0, colors=_INK)
    axis.tick_params(axis="y", labelsize=7)
    for spine in axis.spines.values():
        spine.set_visible(False)
