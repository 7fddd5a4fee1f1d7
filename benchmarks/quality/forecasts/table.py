"""The table of the comparison: mean PSNR and gain over Taylor, with bootstrap intervals over the held-out images.

The images of all seeds are drawn with replacement, each seed's among themselves, and a gain is that of the same images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
BASE = "Taylor"  # what gains are measured against, on the same schedule

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[NDArray[np.float64]]) -> Interval:
        """The interval of the mean; `values` holds one array per seed, with one value per image."""
        generator = np.random.default_rng(0)
        drawn = [own[generator.integers(len(own), size=(DRAWS, len(own)))].mean(axis=1) for own in values]
        low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
        return cls(float(np.mean([own.mean() for own in values])), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} - {self.high:.2f})"


@dataclass(frozen=True)
class Line:
    """One method on one schedule.

    Attributes:
        psnr: to the uncached images, dB.
        gain: over `BASE` on the same schedule and level of sites (sub-layers for other libraries), dB.
        latency: median seconds per run, None if it was not measured.
    """

    schedule: str
    level: str
    method: str
    seeds: int
    setting: Mapping[str, Any]
    speedup: float
    psnr: Interval
    gain: Interval
    latency: float | None


def lines(rows: Iterable[Row], latency: Mapping[tuple[str, str, str], float]) -> list[Line]:
    """One line per schedule, level and method, in the order of the rows; rows without figures are left out."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "psnr_of_images" in row:
            groups.setdefault((row["schedule"], row["level"], row["method"]), []).append(row)
    found = []
    for (schedule, level, method), group in groups.items():
        base = groups.get((schedule, level, BASE)) or groups.get((schedule, "sublayer", BASE), [])
        theirs = {row["seed"]: _scores(row) for row in base}
        own = {row["seed"]: _scores(row) for row in group}
        paired = [own[seed] - theirs[seed] for seed in own if seed in theirs]
        found.append(
            Line(
                schedule,
                level,
                method,
                len(own),
                group[0]["setting"],
                float(np.mean([row["speedup"] for row in group])),
                Interval.of(list(own.values())),
                Interval.of(paired) if paired else Interval(np.nan, np.nan, np.nan),
                latency.get((schedule, level, method)),
            )
        )
    levels = list(dict.fromkeys(level for _, level, _ in groups))
    return sorted(found, key=lambda line: (line.schedule == "bundled", line.schedule, levels.index(line.level)))


def markdown(found: Iterable[Line]) -> str:
    """A Markdown table."""
    table = [
        ["schedule", "sites", "method", "setting", "speed-up", "PSNR, dB", f"gain over {BASE}, dB", "s per run"],
        ["---"] * 8,
    ]
    for line in found:
        setting = ", ".join(f"{name} {value}" for name, value in line.setting.items() if value is not None)
        latency = "-" if line.latency is None else f"{line.latency:.3f}"
        own = [line.schedule, line.level, line.method, setting, f"{line.speedup:.2f}x", str(line.psnr), str(line.gain)]
        table.append([*own, latency])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def overview(found: Iterable[Line]) -> str:
    """A Markdown table of PSNR alone: one row per level and method, one column per schedule."""
    lines = list(found)
    schedules = list(dict.fromkeys(line.schedule for line in lines))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        own = f"{line.psnr.mean:.1f} ({line.psnr.low:.1f} - {line.psnr.high:.1f})"
        cells.setdefault((line.level, line.method), {})[line.schedule] = own
    table = [["sites", "method", *schedules], ["---"] * (2 + len(schedules))]
    for (level, method), own in cells.items():
        table.append([level, method, *(own.get(schedule, "-") for schedule in schedules)])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _scores(row: Row) -> NDArray[np.float64]:
    return np.array(row["psnr_of_images"], dtype=np.float64)
