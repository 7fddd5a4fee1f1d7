"""Latency of whole runs, two images with guidance and their decoding included: all methods in turn in each round."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import rows as common
from benchmarks.quality.forecasts.cells import PEER, Cell, Comparison, bundled_pipeline, sample
from benchmarks.quality.forecasts.methods import METHODS, Setting
from benchmarks.quality.forecasts.peers import SETTINGS, why_not
from benchmarks.timing import Spread, interleaved

PATH = common.RESULTS / "forecasts-latency-cpu.json"
IMAGES = 2
UNCACHED = "uncached"

Key = tuple[str, str, str]
"""Schedule, level, method."""


def medians(path: Path = PATH) -> dict[Key, float]:
    """The measured medians, in seconds per run."""
    return {(row["schedule"], row["level"], row["method"]): row["seconds"] for row in common.read(path)}


def measure(cells: Iterable[Cell], repeats: int, settings: Mapping[Key, Setting], path: Path = PATH) -> None:
    """Time the methods of the cells, one schedule after the other, and write their rows.

    Args:
        cells: of the cells of one method, the first is timed.
        repeats: rounds; each times every method once.
        settings: those of the quality rows; a method without one has its default.
        path: the file of the rows.
    """
    by_schedule: dict[str, dict[Key, Cell]] = {}
    for cell in cells:
        by_schedule.setdefault(cell.schedule, {}).setdefault((cell.schedule, cell.level, cell.method), cell)
    for schedule, chosen in by_schedule.items():
        with ExitStack() as prepared:
            providers = {
                (schedule, "-", UNCACHED): functools.partial(sample, bundled_pipeline(), IMAGES, 0),
                **{
                    key: functools.partial(_sampler(prepared, cell, settings.get(key)), IMAGES, 0)
                    for key, cell in chosen.items()
                    if cell.level != PEER or why_not(cell.name) is None
                },
            }
            seconds = interleaved({"|".join(key): run for key, run in providers.items()}, repeats)
        rows = [_row(*name.split("|"), own) for name, own in seconds.items()]
        common.merge(path, rows, ("schedule", "level", "method"))


def _sampler(prepared: ExitStack, cell: Cell, setting: Setting | None) -> Any:
    """A function that samples in the cell's way, on a pipeline of its own."""
    default = SETTINGS[cell.name][0] if cell.level == PEER else METHODS[cell.name].default
    comparison = Comparison(bundled_pipeline(), IMAGES, {})
    return prepared.enter_context(comparison.prepared(cell, setting or default)).sample


def _row(schedule: str, level: str, method: str, seconds: list[float]) -> dict[str, Any]:
    spread = Spread.of(seconds)
    figures = {"seconds": spread.p50, "p20": spread.p20, "p80": spread.p80}
    return {
        **{"benchmark": "forecasts-latency", "schedule": schedule, "level": level, "method": method, "images": IMAGES},
        **common.rounded(figures),
        "repeats": len(seconds),
    }
