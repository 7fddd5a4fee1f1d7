"""Pictures of a schedule: a heat map (`plot`, matplotlib) and a drawing for the terminal (`render`, rich).

Both show steps from top to bottom and sites from left to right, with one panel per kind of site, because what a method
learns differs more between attention and MLP than between neighbouring blocks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.files import save_figure
from harmonica_rt.schedule.producers import site_kind
from harmonica_rt.untrusted.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.text import Text


_MAX_PANELS = 8  # with more kinds than this, all sites share one panel, in execution order
_LABEL, _FACT = 60, 2000  # characters at most
_WIDEST, _HIGHEST = 40.0, 100.0  # inches of a heat map; a larger one is scaled down
_COMPUTE, _REUSE, _INK, _PAPER = "#27476e", "#f6d8a8", "#2b2b2b", "white"


@dataclass(frozen=True)
class _Panel:
    """Sites of one kind: their columns in the schedule, and a short printable label for each."""

    title: str
    columns: tuple[int, ...]
    labels: tuple[str, ...]
    axis: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", one_line(self.title, _LABEL))
        object.__setattr__(self, "labels", tuple(one_line(label, _LABEL) for label in self.labels))


def _panels(sites: Sequence[str]) -> list[_Panel]:
    kinds: dict[str, list[int]] = {}
    for column, site in enumerate(sites):
        kinds.setdefault(site_kind(site), []).append(column)
    if len(kinds) > min(_MAX_PANELS, max(1, len(sites) // 2)):
        return [_Panel("sites", tuple(range(len(sites))), tuple(sites), "site")]
    return [_panel(kind, columns, sites) for kind, columns in kinds.items()]


def _panel(kind: str, columns: list[int], sites: Sequence[str]) -> _Panel:
    """The panel of a kind: sites are labelled by block numbers if these tell them apart, else by their parents."""
    paths = [sites[column].split(".") for column in columns]
    numbers = [".".join(part for part in path if part.isdigit()) for path in paths]
    if all(numbers) and len(set(numbers)) == len(numbers):
        return _Panel(kind, tuple(columns), tuple(numbers), "block")
    owners = [".".join(path[: len(path) - path[::-1].index(kind) - 1]) or kind for path in paths]
    return _Panel(kind, tuple(columns), tuple(owners), "")


def _facts(schedule: ScheduleData) -> list[tuple[str, str]]:
    """The provenance as (name, value) pairs; unknown entries are left out."""
    facts = []
    if (model := schedule.model) is not None:
        mark = f" ({model.config_fingerprint})" if model.config_fingerprint else ""
        facts.append(("model", model.class_name + mark))
    if schedule.sampler is not None:
        facts.append(("sampler", schedule.sampler.class_name))
    if (times := schedule.timesteps) is not None:
        facts.append(("timesteps", f"{times[0]:g} ... {times[-1]:g}"))
    if schedule.guidance is not None:
        facts.append(("guidance", f"{schedule.guidance:g}"))
    if (made := schedule.made_by) is not None:
        params = "".join(f", {name}={value}" for name, value in made.hyper_parameters.items())
        tau = "" if made.threshold is None else f", threshold {made.threshold:g}"
        facts.append(("made by", made.method + params + tau + (", with scores" if made.scores is not None else "")))
    return [(name, one_line(value, _FACT)) for name, value in facts]


def render(schedule: ScheduleData, width: int | None = None) -> Text:
    """The schedule as text: a header, then one row per step and one column per site.

    It is also readable without colour. If the sites do not fit into `width`, a column stands for several sites, and its
    shade for the share of them that is computed; the legend says so.

    Args:
        schedule: what to draw.
        width: columns to use; by default the terminal's.

    Returns:
        A `rich.text.Text`: print it with a `rich.console.Console`, or use `.plain`.
    """
    from rich.text import Text

    room = shutil.get_terminal_size((100, 24)).columns if width is None else max(width, 1)
    text = Text()
    patterns = f"{schedule.patterns} pattern{'s' if schedule.patterns != 1 else ''}"
    text.append(f"{schedule.steps} steps x {len(schedule.sites)} sites, ", "bold")
    text.append(f"CUR {schedule.cur:.2%}", "bold green")
    text.append(f", {patterns}\n")
    kinds = ", ".join(f"{one_line(kind)} {cur:.2%}" for kind, cur in schedule.cur_per_kind().items())
    for name, value in [("CUR by kind", kinds), *_facts(schedule)]:
        text.append(f"{name:<12}", "dim")
        text.append(f"{value}\n")
    text.append("\n")
    _append_rows(text, schedule, room)
    return text


def _append_rows(text: Text, schedule: ScheduleData, room: int) -> None:
    panels = _panels(schedule.sites)
    margin = len("step  ") + len(" 100.0%") + 3 * (len(panels) - 1)
    group = 1  # sites that share one column
    longest = max(len(panel.columns) for panel in panels)
    while group < longest and margin + sum(-(-len(panel.columns) // group) for panel in panels) > room:
        group += 1
    parts = [_shares(schedule.compute[:, panel.columns], group) for panel in panels]
    # a panel is at least as wide as its title if there is room
    titled = [max(part.shape[1], len(panel.title)) for panel, part in zip(panels, parts, strict=True)]
    widths = titled if margin + sum(titled) <= room else [part.shape[1] for part in parts]
    titles = [panel.title[:cells].ljust(cells) for panel, cells in zip(panels, widths, strict=True)]
    text.append("step  " + "   ".join(titles) + "    CUR\n", "dim")
    for step, cur in enumerate(schedule.cur_per_step()):
        text.append(f"{step:>4}  ", "dim")
        for number, (part, cells) in enumerate(zip(parts, widths, strict=True)):
            text.append("   " if number else "")
            for share in part[step]:
                text.append(*_glyph(float(share)))
            text.append(" " * (cells - part.shape[1]))
        text.append(f" {cur:6.1%}\n")
    text.append("\n█ compute  · reuse", "dim")
    text.append(f"  ▓░ some of {group} sites per column\n" if group > 1 else "\n", "dim")


def _shares(compute: NDArray[np.bool_], group: int) -> NDArray[np.float64]:
    """Share of computed sites in each group of `group` consecutive sites: `[steps, ceil(sites / group)]`."""
    starts = np.arange(0, compute.shape[1], group)
    return np.stack([compute[:, s : s + group].mean(axis=1) for s in starts], axis=1)


def _glyph(share: float) -> tuple[str, str]:
    if share in (0.0, 1.0):
        return ("█", "blue") if share else ("·", "yellow")
    return ("▓", "blue") if share >= 0.5 else ("░", "blue")


def plot(schedule: ScheduleData, path: str | os.PathLike[str] | None = None) -> Figure:
    """The schedule as a heat map, with the CUR per step on the right; see `Schedule.plot`.

    Uses matplotlib's object interface: no pyplot, no global state, no display.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    panels, steps = _panels(schedule.sites), schedule.steps
    sites = len(schedule.sites)
    cell_w = min(max(9.5 / sites, 0.062), 0.3)  # inches
    cell_h = min(max(6.0 / steps, 0.13), 0.3)
    bars_w = 1.1
    long_labels = max(len(label) for panel in panels for label in panel.labels) > 5
    # no panel is narrower than its title needs
    widths = [max(cell_w * len(panel.columns), 0.09 * len(panel.title) + 0.2) for panel in panels]
    made = f"  ·  {one_line(schedule.made_by.method)}" if schedule.made_by else ""
    title = f"CUR {schedule.cur:.2%}  ·  {steps} steps x {sites} sites{made}"
    width = max(sum(widths) + bars_w + 0.25 * len(panels) + 1.1, 0.125 * len(title))
    height = cell_h * steps + (2.9 if long_labels else 1.9)
    figure = Figure(
        figsize=(min(width, _WIDEST), min(height, _HIGHEST)),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
        facecolor=_PAPER,
    )
    axes = figure.subplots(
        1, len(panels) + 1, sharey=True, squeeze=False, gridspec_kw={"width_ratios": [*widths, bars_w]}
    )[0]
    for panel, axis, inches in zip(panels, axes[:-1], widths, strict=True):
        _draw_panel(axis, schedule, panel, inches)
    _draw_bars(axes[-1], schedule)
    axes[0].set_ylim(steps, 0)
    stride = _stride(steps, 25)
    axes[0].set_yticks(np.arange(0, steps, stride) + 0.5, [str(s) for s in range(0, steps, stride)])
    axes[0].set_ylabel("step", color=_INK)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK, parse_math=False)
    figure.legend(
        handles=[Patch(facecolor=_COMPUTE, label="compute"), Patch(facecolor=_REUSE, label="reuse")],
        loc="outside lower center", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    if path is not None:
        save_figure(figure, path, dpi=160)
    return figure


def _draw_panel(axis: Axes, schedule: ScheduleData, panel: _Panel, inches: float) -> None:
    from matplotlib.colors import ListedColormap

    count = len(panel.columns)
    axis.pcolormesh(
        schedule.compute[:, panel.columns].astype(np.float64),
        cmap=ListedColormap([_REUSE, _COMPUTE]), vmin=0.0, vmax=1.0,
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


def _stride(count: int, room: int) -> int:
    """The smallest of 1, 2, 5, 10, ... that leaves at most `room` of `count` ticks."""
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if s >= count or count <= s * room)


def _strip(axis: Axes) -> None:
    axis.tick_params(length=0, colors=_INK)
    axis.tick_params(axis="y", labelsize=7)
    for spine in axis.spines.values():
        spine.set_visible(False)
