"""Schedules with weights: ways to set them, and `resample`, which keeps them in step with the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from numpy.typing import ArrayLike

from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.producers import check_count
from harmonica_rt.schedule.provenance import MadeBy, WeightsBy
from harmonica_rt.schedule.resampled_weights import remake
from harmonica_rt.schedule.resampling import resampled_rows
from harmonica_rt.schedule.weight_rules import (
    Rule,
    chebyshev_rule,
    hermite_rule,
    ratios_rule,
    taylor_rule,
    weights_by_rule,
)


@dataclass(frozen=True, eq=False, repr=False)
class WeightedSchedule(ScheduleData):
    """A schedule whose weights can be set; `Schedule` documents it."""

    def with_weights(self, weights: ArrayLike | None, *, by: WeightsBy | None = None) -> Self:
        """A copy whose reused entries are `sum_j weights[j] * (the j-th latest computed value)`.

        Args:
            weights: `[steps, order]`, shared by the sites of a step, or `[steps, sites, order]`, newest value first; at
                most 4 per entry, rounded to float32. Those of computed entries are ignored. None: plain reuse.
            by: the method that made them, for the provenance.

        Raises:
            ScheduleError: the shape is wrong, a number is not finite, all weights of a reused entry are 0, or an entry
                has weights for more values than were computed before it.
        """
        return replace(self, weights=cast(Any, weights), weights_by=by)  # the constructor checks them

    def with_taylor(self, order: int = 1, *, since: int = 0) -> Self:
        """A copy with the weights of TaylorSeer (arXiv 2503.06923): a Taylor series of finite differences.

        Each site extrapolates from the steps at which it was itself computed. Entries that have fewer earlier values
        than `order + 1` use a lower order. See `weight_rules.taylor_rule` for the equation, and for what it is exact.

        Args:
            order: the highest difference, 1 ... 3; an entry has up to `order + 1` weights.
            since: values that were computed before this step are not subtracted from. 0 as in diffusers, 2 as in
                cache-dit, the number of warm-up steps less 1 in TaylorSeer's code.
        """
        return self._by_rule(taylor_rule(order, since), "taylor", order=order, since=since)

    def with_hermite(self, order: int = 2, *, contraction: float = 0.5, since: int = 0) -> Self:
        """A copy with the weights of HiCache (arXiv 2508.16984): scaled Hermite polynomials of finite differences.

        See `weight_rules.hermite_rule` for the equation. `order` and `since` are as in `with_taylor`.
        """
        return self._by_rule(
            hermite_rule(order, contraction, since), "hermite", order=order, contraction=contraction, since=since
        )

    def with_chebyshev(self, degree: int = 4, *, ridge: float = 0.1, blend: float = 1.0, values: int = 4) -> Self:
        """A copy with the weights of Spectrum (arXiv 2603.01623): a ridge regression on Chebyshev polynomials.

        It is Spectrum as far as that is linear and static: the fit, from up to 4 values, but not the choice of steps.
        See `weight_rules.chebyshev_rule` for the equation.

        Args:
            degree: of the polynomial.
            ridge: the weight of the squared coefficients in the regression, above 0.
            blend: the share of the fit; the rest is the straight line through the last two values.
            values: how many of the latest values are fitted, 1 ... 4.
        """
        return self._by_rule(
            chebyshev_rule(self.steps, degree, ridge, blend, values),
            "chebyshev",
            degree=degree,
            ridge=ridge,
            blend=blend,
            values=values,
        )

    def with_ratios(self, ratios: Sequence[float]) -> Self:
        """A copy that scales a reused value by the magnitude ratios of the steps since it was computed, one weight.

        Args:
            ratios: as MagCache measures them (arXiv 2506.09045), one per step: the mean magnitude of the step's
                residual divided by that of the step before.
        """
        return self._by_rule(ratios_rule(self.steps, ratios), "ratios", ratios=ratios)

    def _by_rule(self, rule: Rule, method: str, **settings: object) -> Self:
        return self.with_weights(weights_by_rule(rule, self.compute), by=WeightsBy(method, settings))

    def resample(self, steps: int) -> Self:
        """A schedule of the same sites for another number of steps, which computes each as often per step as this one.

        Every row of the mask is one of this schedule's, so no step reuses other sites together than a step of this one
        (what it stores for later steps may be new). Weights that a rule made (`with_taylor`, ...) are made by the rule
        again. Of other weights, the parts of a Taylor series are taken, scaled to the new distances, and interpolated
        in time. Entries whose history has become too short have fewer weights. `timesteps` are dropped, scores follow
        their rows, and the hyper-parameters in `made_by` say `resampled_from`: the number of steps that the schedule
        was made for.

        Raises:
            ScheduleError: `steps` is not a whole number of at least 1, or float32 cannot hold a weight.
        """
        if check_count(steps, "steps") == self.steps:
            return self
        rows = resampled_rows(self.compute, steps)
        compute = self.compute[rows]
        weights, by = None, None
        if self.weights is not None:
            weights, by = remake(self.entry_weights, self.weights_by, self.compute, compute)
        made = self.made_by or MadeBy("resampled")
        origin = made.hyper_parameters.get("resampled_from", self.steps)
        made_by = replace(
            made,
            hyper_parameters={**made.hyper_parameters, "resampled_from": origin},
            scores=None if made.scores is None else [made.scores[row] for row in rows],
        )
        return replace(self, compute=compute, timesteps=None, made_by=made_by, weights=weights, weights_by=by)
