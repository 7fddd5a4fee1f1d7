"""The schedules that caches of diffusers follow: TaylorSeer's, from its config, and MagCache's, from measured ratios.

Both decide without looking at a value, so what they compute is known before a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_number, check_sequence
from harmonica_rt.schedule.producers import check_count
from harmonica_rt.untrusted.text import quoted


@dataclass(frozen=True)
class TaylorSeer:
    """The fields of `TaylorSeerCacheConfig` that decide about steps, with the defaults of diffusers."""

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    max_order: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name.startswith("disable") else 1
            if value is None and field.name == "disable_cache_after_step":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ScheduleError(f"{field.name}: expected a whole number of at least {least}, got {quoted(value)}")

    def mask(self, steps: int, n_sites: int) -> NDArray[np.bool_]:
        """The mask `[steps, sites]`: it computes before and after two steps, and at an interval in between."""
        step = np.arange(check_count(steps, "steps"))
        computed = (step < self.disable_cache_before_step) | (
            (step - self.disable_cache_before_step - 1) % self.cache_interval == 0
        )
        if self.disable_cache_after_step is not None:
            computed |= step >= self.disable_cache_after_step
        return np.repeat(computed[:, None], n_sites, axis=1)

    def plain(self) -> dict[str, object]:
        """The fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def taylorseer(config: object) -> TaylorSeer:
    """The fields that decide about steps, of a config or of a mapping of its fields."""
    names = [field.name for field in fields(TaylorSeer)]
    if isinstance(config, Mapping):
        if odd := [name for name in config if name not in names]:
            raise ScheduleError(f"config: {quoted(odd[0])} decides about no step; the fields that do are {names}")
        return TaylorSeer(**config)
    if missing := [name for name in names if not hasattr(config, name)]:
        raise ScheduleError(
            f"config: expected a TaylorSeerCacheConfig or a mapping, got a {type(config).__name__} without {missing[0]}"
        )
    return TaylorSeer(**{name: getattr(config, name) for name in names})


@dataclass(frozen=True)
class MagCache:
    """The settings of MagCache (arXiv 2506.09045), as `MagCacheConfig` of diffusers names them."""

    num_inference_steps: int
    threshold: float
    max_skip_steps: int
    retention_ratio: float

    def __post_init__(self) -> None:
        check_count(self.num_inference_steps, "steps")
        check_number(self.threshold, "threshold")
        check_count(self.max_skip_steps, "max_skip_steps")
        if not 0 <= check_number(self.retention_ratio, "retention_ratio") <= 1:
            raise ScheduleError(f"retention_ratio: expected 0 ... 1, got {self.retention_ratio}")

    def ratios(self, measured: Sequence[float]) -> list[float]:
        """One ratio per step: the measured ones, or the nearest of them for another number of steps."""
        numbers = [check_number(ratio, f"ratios[{i}]") for i, ratio in enumerate(check_sequence(measured, "ratios"))]
        if not numbers:
            raise ScheduleError("ratios: expected at least one, got none")
        steps = self.num_inference_steps
        if steps == len(numbers):
            return numbers
        if steps == 1:
            return numbers[-1:]
        places = np.round(np.arange(steps) * ((len(numbers) - 1) / (steps - 1))).astype(int)
        return [numbers[place] for place in places]

    def mask(self, ratios: Sequence[float], n_sites: int) -> NDArray[np.bool_]:
        """The mask `[steps, sites]` for one ratio per step.

        Since the last computed step, the error is `sum |1 - product of the ratios|`. A step is skipped while that is at
        most `threshold` and no more than `max_skip_steps` steps in a row are skipped.
        """
        steps = self.num_inference_steps
        retained = int(self.retention_ratio * steps + 0.5)
        computed = np.ones(steps, dtype=np.bool_)
        product, error, skipped = 1.0, 0.0, 0
        for step in range(retained, steps):
            product, skipped = product * ratios[step], skipped + 1
            error += abs(1.0 - product)
            if step and error <= self.threshold and skipped <= self.max_skip_steps:
                computed[step] = False
            else:
                product, error, skipped = 1.0, 0.0, 0
        return np.repeat(computed[:, None], n_sites, axis=1)

    def plain(self) -> dict[str, object]:
        """The settings by name."""
        return asdict(self)
