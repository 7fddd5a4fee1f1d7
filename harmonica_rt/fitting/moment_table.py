"""What the calls of a fit have shown so far of each entry, and the weights that follow from it.

The sites of a step share weights unless each is to have its own: a site's part in them is its part in the sum of
squared errors. A site whose history has fewer values than those of the others shares with sites of as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.fitting.moments import Moments, fitted_weights, moments_of, no_moments, squared_error
from harmonica_rt.indices import SiteIndex, StepIndex
from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule.weights import Weights, computed_before

EntryWeights = NDArray[np.float64]
"""The weights of an entry, newest value first."""


@dataclass(frozen=True)
class FitOptions:
    """What is fitted.

    Attributes:
        order: the most weights per entry.
        per_site: whether each site of a step has weights of its own.
    """

    order: int
    per_site: bool


class MomentTable:
    """The moments of the reused entries of a schedule, added up over calls.

    Attributes:
        values: int `[steps, sites]`, how many values each entry takes.
    """

    def __init__(self, schedule: Schedule, options: FitOptions) -> None:
        self.values = np.minimum(options.order, computed_before(schedule.compute))
        self._schedule = schedule
        self._options = options
        self._moments: dict[StepIndex, dict[SiteIndex, Moments]] = {}

    @property
    def seen(self) -> int:
        """The number of entries that calls have reached."""
        return sum(map(len, self._moments.values()))

    def learn(self, step: StepIndex, site: SiteIndex, truth: Sequence[Any], values: Sequence[Sequence[Any]]) -> None:
        """Add what one call shows of an entry.

        Args:
            step, site: the entry.
            truth: what the site should return, one output for each time that it runs in the call.
            values: what it returned when it was last computed, newest first.

        Raises:
            HarmonicaError: an output is not finite.
        """
        total = self._moments.get(step, {}).get(site, no_moments(len(values)))
        for true, *latest in zip(truth, *values, strict=True):
            total = total + moments_of(true, latest)
        if not np.isfinite(total).all():
            raise HarmonicaError(
                f"{self._schedule.sites[site]} returns NaN or infinity at step {step}, to which nothing can be fitted; "
                "check the images of the uncached pipeline in this dtype"
            )
        self._moments.setdefault(step, {})[site] = total

    def weights(self, step: StepIndex) -> dict[SiteIndex, EntryWeights]:
        """The weights of those entries of a step that calls have reached."""
        return {site: weights for weights, sites in self._fits(step) for site in sites}

    def all_weights(self, unseen: Weights) -> Weights:
        """The weights of all entries, `[steps, sites, order]`; `unseen` has those of entries that no call reached."""
        width = max(self._options.order, unseen.shape[-1])
        found = np.zeros((*self.values.shape, width))
        found[:, :, : unseen.shape[-1]] = unseen
        for step in self._moments:
            for site, own in self.weights(step).items():
                found[step, site] = np.pad(own, (0, width - len(own)))
        return found

    def relative_error(self) -> float:
        """The root mean square error that the fit leaves in the calls, divided by that of plain reuse."""
        plain = sum(float(moments[-1, -1]) for own in self._moments.values() for moments in own.values())
        left = sum(
            squared_error(self._moments[step][site], weights)
            for step in self._moments
            for weights, sites in self._fits(step)
            for site in sites
        )
        return float(np.sqrt(left / plain)) if plain else 0.0

    def _fits(self, step: StepIndex) -> Iterable[tuple[EntryWeights, list[SiteIndex]]]:
        """Weights, each with the sites that have them."""
        own = self._moments.get(step, {})
        groups: dict[int, list[SiteIndex]] = {}
        for site in own:
            groups.setdefault(site if self._options.per_site else int(self.values[step, site]), []).append(site)
        return [(fitted_weights(sum((own[s] for s in sites[1:]), own[sites[0]])), sites) for sites in groups.values()]
