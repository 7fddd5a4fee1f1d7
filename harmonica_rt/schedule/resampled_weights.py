"""Weights for a resampled mask: the rule again if a rule made them, else the gains of their Taylor terms, interpolated.

Weights depend on the distances of the steps at which a site was computed, and these change. Weights of n values are
the sum of the n Taylor terms of these values, each times a gain: 1 for all is Taylor, 1 for the first alone is plain
reuse. Gains have no unit of time, so they are what is kept: between the reused entries of a site, each gain is
interpolated over the share of the run that has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.differences import taylor_terms
from harmonica_rt.schedule.provenance import WeightsBy
from harmonica_rt.schedule.weight_rules import Rule, rule_of, weights_by_rule
from harmonica_rt.schedule.weights import Weights, check_weights, same_weights

_MEASURED = ("calls", "samples", "relative_error")  # what a fit measured holds for its own number of steps

_NOTHING = 1e-6  # weights that add up to less are the rounding errors of gains of 0


def remake(
    weights: Weights, by: WeightsBy | None, compute: NDArray[np.bool_], resampled: NDArray[np.bool_]
) -> tuple[Weights, WeightsBy]:
    """The weights of the mask `resampled`, and who made them.

    Args:
        weights: those of each entry of `compute`, `[steps, sites, order]`.
        by: the method that made them; its rule is applied again if it gives exactly these weights.
        compute: the mask that they are for.
        resampled: the mask of the same sites that they are wanted for.
    """
    found = None if by is None else _applied_again(weights, by, compute, resampled)
    if found is not None:
        return found
    method = "unknown" if by is None else by.method
    settings = {} if by is None else {name: n for name, n in by.hyper_parameters.items() if name not in _MEASURED}
    settings["resampled_from"] = settings.get("resampled_from", len(compute))
    return _interpolated(weights, compute, resampled), WeightsBy(method, settings)


def _applied_again(
    weights: Weights, by: WeightsBy, compute: NDArray[np.bool_], resampled: NDArray[np.bool_]
) -> tuple[Weights, WeightsBy] | None:
    old, new = len(compute), len(resampled)
    try:
        rule = rule_of(by.method, by.hyper_parameters, old)
    except ScheduleError:  # settings from elsewhere under the name of a rule
        return None
    if rule is None or not _made_by(rule, weights, compute):
        return None
    if by.method == "ratios":
        ratios = resampled_ratios(np.array(by.hyper_parameters["ratios"], dtype=np.float64), new)
        by = WeightsBy(by.method, {"ratios": ratios})
    again = rule_of(by.method, by.hyper_parameters, new)
    return None if again is None else (weights_by_rule(again, resampled), by)


def _made_by(rule: Rule, weights: Weights, compute: NDArray[np.bool_]) -> bool:
    """Whether a rule makes exactly these weights."""
    sites = tuple(f"site{number}" for number in range(compute.shape[1]))
    made = check_weights(weights_by_rule(rule, compute), compute, sites)
    given = check_weights(weights, compute, sites)
    return same_weights(made, given)


def resampled_ratios(ratios: NDArray[np.float64], steps: int) -> list[float]:
    """Magnitude ratios for another number of steps: the magnitudes, their products, are interpolated in time."""
    old = len(ratios)
    magnitudes = np.cumsum(np.log([1.0, *ratios[1:]]))
    found = np.interp(np.arange(steps) * old / steps, np.arange(old), magnitudes)
    return [1.0, *(float(np.exp(new - last)) for last, new in pairwise(found))]


def _interpolated(weights: Weights, compute: NDArray[np.bool_], resampled: NDArray[np.bool_]) -> Weights:
    order = weights.shape[-1]
    made = np.zeros((*resampled.shape, order))
    for site in range(compute.shape[1]):
        gains, shares = _gains(weights[:, site], compute[:, site])
        for step, history in _histories(resampled[:, site], order):
            share = (step + 0.5) / len(resampled)
            terms = taylor_terms(step, history, order - 1)
            known = [i for i in range(len(terms)) if np.isfinite(gains[:, i]).any()]
            own = [_at(share, shares, gains[:, i]) for i in known]
            made[step, site, : len(history)] = own @ terms[known] if known else np.eye(1, len(history))[0]
            if np.abs(made[step, site]).sum() < _NOTHING:  # no term is left that has a gain
                made[step, site, 0] = 1.0
    return made


def _gains(weights: Weights, computed: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The gains `[entries, order]` of a site's reused entries, NaN where the history is too short, and their times."""
    order = weights.shape[-1]
    entries = list(_histories(computed, order))
    gains = np.full((len(entries), order), np.nan)
    for number, (step, history) in enumerate(entries):
        terms = taylor_terms(step, history, order - 1)
        gains[number, : len(terms)] = np.linalg.solve(terms.T, weights[step, : len(terms)])
    return gains, np.array([(step + 0.5) / len(computed) for step, _ in entries])


def _histories(computed: NDArray[np.bool_], order: int) -> Sequence[tuple[int, list[int]]]:
    """Each step that reuses a site, with the latest steps that computed it, at most `order`, newest first."""
    steps = np.flatnonzero(computed)
    return [(int(step), [int(s) for s in steps[steps < step][::-1][:order]]) for step in np.flatnonzero(~computed)]


def _at(share: float, shares: NDArray[np.float64], gains: NDArray[np.float64]) -> float:
    known = np.isfinite(gains)
    return float(np.interp(share, shares[known], gains[known]))
