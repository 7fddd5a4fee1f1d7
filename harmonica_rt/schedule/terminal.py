"""The drawing of a schedule for the terminal: steps from top to bottom, sites from left to right."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.panels import facts, panels_of, weights_of_entries
from harmonica_rt.schedule.weights import reach
from harmonica_rt.untrusted.text import one_line

if TYPE_CHECKING:
    from rich.text import Text


def render(schedule: ScheduleData, width: int | None = None) -> Text:
    """The schedule as text: a header, then one row per step and one column per site.

    It is also readable without colour: reused entries with weights are drawn as the number of these. The weights of a
    step are at the end of its row, if all its sites share them and there is room. If the sites do not fit into `width`,
    a column stands for several sites, and its shade for the share of them that is computed; the legend says so.

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
    for name, value in [("CUR by kind", kinds), *facts(schedule)]:
        text.append(f"{name:<12}", "dim")
        text.append(f"{value}\n")
    text.append("\n")
    _append_rows(text, schedule, room)
    return text


def _append_rows(text: Text, schedule: ScheduleData, room: int) -> None:
    panels = panels_of(schedule.sites)
    margin = len("step  ") + len(" 100.0%") + 3 * (len(panels) - 1)
    group = 1  # sites that share one column
    longest = max(len(panel.columns) for panel in panels)
    while group < longest and margin + sum(-(-len(panel.columns) // group) for panel in panels) > room:
        group += 1
    parts = [_shares(schedule.compute[:, panel.columns], group) for panel in panels]
    counts = [_most(weights_of_entries(schedule)[:, panel.columns], group) for panel in panels]
    # a panel is at least as wide as its title if there is room
    titled = [max(part.shape[1], len(panel.title)) for panel, part in zip(panels, parts, strict=True)]
    widths = titled if margin + sum(titled) <= room else [part.shape[1] for part in parts]
    titles = [panel.title[:cells].ljust(cells) for panel, cells in zip(panels, widths, strict=True)]
    weights = _weights_of_steps(schedule, room - margin - sum(widths))
    text.append("step  " + "   ".join(titles) + "    CUR" + ("  weights\n" if any(weights) else "\n"), "dim")
    for step, cur in enumerate(schedule.cur_per_step()):
        text.append(f"{step:>4}  ", "dim")
        for number, (part, count, cells) in enumerate(zip(parts, counts, widths, strict=True)):
            text.append("   " if number else "")
            for share, most in zip(part[step], count[step], strict=True):
                text.append(*_glyph(float(share), int(most)))
            text.append(" " * (cells - part.shape[1]))
        text.append(f" {cur:6.1%}{weights[step]}\n")
    text.append("\n█ compute  · reuse", "dim")
    text.append("  1-4 reuse with so many weights" if schedule.weights is not None else "", "dim")
    text.append(f"  ▓░ some of {group} sites per column\n" if group > 1 else "\n", "dim")


def _weights_of_steps(schedule: ScheduleData, room: int) -> list[str]:
    """The weights of each step, in a column of their own; empty texts if they do not fit or there are none."""
    nothing = [""] * schedule.steps
    if schedule.weights is None:
        return nothing
    made = []
    for weights, computes in zip(schedule.entry_weights, schedule.compute, strict=True):
        own = np.unique(weights[~computes], axis=0)
        numbers = " ".join(f"{weight:.4g}" for weight in own[0][: int(reach(own[0]))]) if len(own) == 1 else ""
        made.append(numbers or ("by site" if len(own) else ""))
    texts = [f"  {numbers}" if numbers else "" for numbers in made]
    return texts if max(len("  weights"), *map(len, texts)) <= room else nothing


def _shares(compute: NDArray[np.bool_], group: int) -> NDArray[np.float64]:
    """Share of computed sites in each group of `group` consecutive sites: `[steps, ceil(sites / group)]`."""
    starts = np.arange(0, compute.shape[1], group)
    return np.stack([compute[:, s : s + group].mean(axis=1) for s in starts], axis=1)


def _most(counts: NDArray[np.int64], group: int) -> NDArray[np.int64]:
    """The largest number of weights in each group of sites: `[steps, ceil(sites / group)]`."""
    return np.maximum.reduceat(counts, np.arange(0, counts.shape[1], group), axis=1)


def _glyph(share: float, weights: int) -> tuple[str, str]:
    if share == 0.0:
        return (str(weights), "magenta") if weights else ("·", "yellow")
    if share == 1.0:
        return "█", "blue"
    return ("▓", "blue") if share >= 0.5 else ("░", "blue")
