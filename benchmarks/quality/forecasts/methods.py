"""The forecasts that run in a static plan: each gives a schedule its weights, for some setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harmonica_rt as hrt
from benchmarks.quality.images import GUIDANCE

STEPS = 20
FIT_IMAGES = 4

Setting = Mapping[str, Any]
"""Keyword arguments of a method."""


@dataclass(frozen=True)
class Method:
    """A way to make weights.

    Attributes:
        weigh: (pipeline, schedule, seed, **setting) -> the schedule with weights; only a fit uses pipeline and seed.
        default: the setting that its authors give or, for a fit, the one that the row is about.
        others: settings among which the best is chosen; none if there is nothing to choose.
    """

    weigh: Callable[..., hrt.Schedule]
    default: Setting
    others: Sequence[Setting] = ()

    @property
    def all_settings(self) -> list[Setting]:
        """The default and the others."""
        return [self.default, *(other for other in self.others if other != self.default)]


def _fit(pipeline: Any, schedule: hrt.Schedule, seed: int, **setting: Any) -> hrt.Schedule:
    labels = list(range(FIT_IMAGES))
    call = {"class_labels": labels, "guidance_scale": GUIDANCE, "num_inference_steps": schedule.steps}
    return hrt.fit(pipeline, schedule, [call], seed=seed, **setting)


def _rule(name: str) -> Callable[..., hrt.Schedule]:
    def weigh(pipeline: Any, schedule: hrt.Schedule, seed: int, **setting: Any) -> hrt.Schedule:
        made: hrt.Schedule = getattr(schedule, name)(**setting)
        return made

    return weigh


METHODS: dict[str, Method] = {
    "reuse": Method(_rule("with_weights"), {"weights": None}),
    "Taylor": Method(_rule("with_taylor"), {"order": 1}),
    "Hermite": Method(
        _rule("with_hermite"),
        {"order": 2, "contraction": 0.5},
        [{"order": order, "contraction": c} for order, c in ((1, 0.65), (2, 0.6), (2, 0.65))],
    ),
    "Chebyshev": Method(
        _rule("with_chebyshev"),
        {"degree": 4, "ridge": 0.1, "blend": 0.5},
        [{"degree": degree, "ridge": ridge, "blend": 0.5} for degree, ridge in ((2, 1e-3), (4, 1e-2), (4, 1e-3))],
    ),
    "fitted, 2 weights": Method(_fit, {"order": 2}),
    "fitted, 4 weights": Method(_fit, {"order": 4}),
    "fitted per site, 2 weights": Method(_fit, {"order": 2, "per_site": True}),
}
"""TaylorSeer's order is diffusers' default; HiCache's contraction and Spectrum's ridge and blend are their papers'."""


LEVELS: dict[str, tuple[str, ...]] = {
    "sublayer": tuple(METHODS),
    "output": ("reuse", "Taylor", "fitted, 2 weights", "fitted, 4 weights"),
    "span": ("reuse", "Taylor", "fitted, 2 weights"),
}
"""Levels of sites, with the methods that are compared there."""


def schedules(model: Any, level: str) -> dict[str, hrt.Schedule]:
    """The masks that are compared, by name; the bundled schedule has sub-layers only."""
    sites = hrt.find_sites(model, level=level)
    found = {f"every({k})": hrt.Schedule.every(k, steps=STEPS, sites=sites) for k in (2, 3)}
    return {**found, "bundled": hrt.demo_schedule().with_weights(None)} if level == "sublayer" else found
