"""Interleaved timing: every provider runs once per round, so that a drift of the machine affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of a list of samples."""

    p50: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """The spread of a list of samples."""
        p20, p50, p80 = np.percentile(samples, [20, 50, 80])
        return cls(float(p50), float(p20), float(p80))


def interleaved(providers: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each provider in each of `repeats` rounds, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for run in providers.values():
        run()
    for _ in range(repeats):
        for name, run in providers.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds
