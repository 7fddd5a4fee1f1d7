"""Draws the demo's picture: rows of images, and the schedule below them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule.files import save_figure

_INK, _FAINT = "#2b2b2b", "#6b6b6b"


def draw(rows: Mapping[str, NDArray[np.float32]], schedule: Schedule, title: str, path: str | os.PathLike[str]) -> None:
    """Write a PNG.

    Args:
        rows: label -> images `[N, H, W, C]` in 0 ... 1; the same N for each. The second line of a label is set smaller.
        schedule: drawn as a heat map below the images.
        title: one line at the top.
        path: where to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strips = {label: np.concatenate(list(images), axis=1) for label, images in rows.items()}
    count = len(next(iter(rows.values())))
    strip_height = min(1.2, 10.0 / count)
    heat = schedule.plot()
    heat.set_dpi(220)
    renderer: Any = FigureCanvasAgg(heat)
    renderer.draw()
    canvas = np.asarray(renderer.buffer_rgba())
    heat_height = min(4.5, 10.0 * canvas.shape[0] / canvas.shape[1])

    heights = [*([strip_height] * len(strips)), heat_height]
    figure = Figure(figsize=(11.2, sum(heights) + 1.0), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(heights),
        1,
        hspace=0.08,
        height_ratios=heights,
        left=0.12,
        right=0.99,
        top=1 - 0.6 / figure.get_figheight(),
        bottom=0.01,
    )
    figure.suptitle(title, fontsize=12, color=_INK, y=1 - 0.15 / figure.get_figheight(), va="top")
    for row, (label, strip) in enumerate(strips.items()):
        axis = figure.add_subplot(grid[row])
        axis.imshow(strip if strip.shape[-1] == 3 else strip[..., 0], cmap="gray", vmin=0, vmax=1)
        head, _, detail = label.partition("\n")
        axis.text(-0.01, 0.5, head, transform=axis.transAxes, ha="right", va="center", fontsize=10, color=_INK)
        axis.text(-0.01, 0.3, detail, transform=axis.transAxes, ha="right", va="center", fontsize=7, color=_FAINT)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    axis = figure.add_subplot(grid[len(strips)])
    axis.imshow(canvas, interpolation="antialiased")
    axis.axis("off")
    save_figure(figure, path)
