"""Rules that make weights: Taylor, Hermite, Chebyshev, magnitude ratios. All are linear in a site's latest values.

A rule maps a step and a history (the steps at which a site was last computed, newest first) to the weights of those
values. So sites that were computed at different steps have different weights, and a rule can be applied to any
schedule, also to a resampled one. Distances are measured in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import factorial

import numpy as np
from numpy.polynomial import chebyshev, hermite
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_number, check_sequence
from harmonica_rt.schedule.differences import difference_weights, taylor_terms
from harmonica_rt.schedule.weights import MOST_WEIGHTS, Weights

Rule = Callable[[int, Sequence[int]], NDArray[np.float64]]


def weights_by_rule(rule: Rule, compute: NDArray[np.bool_]) -> Weights:
    """The weights `[steps, sites, MOST_WEIGHTS]` that a rule gives to the reused entries of a mask `[steps, sites]`."""
    weights = np.zeros((*compute.shape, MOST_WEIGHTS))
    columns, of_site = np.unique(compute, axis=1, return_inverse=True)
    for number, column in enumerate(columns.T):
        own = np.zeros((len(column), MOST_WEIGHTS))
        history: list[int] = []
        for step, computed in enumerate(column):
            if computed:
                history = [step, *history[: MOST_WEIGHTS - 1]]
            else:
                made = rule(step, history)
                own[step, : len(made)] = made
        weights[:, of_site.reshape(-1) == number] = own[:, None]
    return weights


def taylor_rule(order: int = 1, since: int = 0) -> Rule:
    """TaylorSeer (arXiv 2503.06923): `sum_i x^i / i! * d_i`, i = 0 ... order; see `differences` for `x` and `d_i`.

    A shorter history lowers the order. Order 1 is the straight line through the last two values, exact for polynomials
    of degree 1. With higher orders the coefficient of the highest power is exact at even spacing, the lower ones are
    not, since the differences stand for derivatives at a point between the values.
    """
    _whole(order, "order", 1, MOST_WEIGHTS - 1)
    _whole(since, "since", 0)
    return lambda step, history: taylor_terms(step, history, order, since).sum(axis=0)


def hermite_rule(order: int = 2, contraction: float = 0.5, since: int = 0) -> Rule:
    """HiCache (arXiv 2508.16984): `d_0 + sum_i c^i H_i(c x) / i! * d_i`, i = 1 ... order.

    `H_i` are the Hermite polynomials of the physicists and `c` is the contraction factor, which scales both their
    argument and the differences. A shorter history lowers the order.
    """
    _whole(order, "order", 1, MOST_WEIGHTS - 1)
    _whole(since, "since", 0)
    factor = _number(contraction, "contraction", above=0.0)

    def rule(step: int, history: Sequence[int]) -> NDArray[np.float64]:
        differences = difference_weights(history, order, since)
        x = factor * (step - history[0])
        basis = [1.0]
        for i in range(1, len(differences)):
            basis.append(factor**i * float(hermite.hermval(x, [0.0] * i + [1.0])) / factorial(i))
        made: NDArray[np.float64] = np.array(basis) @ differences
        return made

    return rule


def chebyshev_rule(steps: int, degree: int = 4, ridge: float = 0.1, blend: float = 1.0, values: int = 4) -> Rule:
    """Spectrum (arXiv 2603.01623): `blend * p(step) + (1 - blend) * (Taylor of order 1)`.

    `p` is the polynomial `sum_m c_m T_m(2 t / steps - 1)`, m = 0 ... degree, that a ridge regression fits to the latest
    `values` values: `c = (X^T X + ridge I)^-1 X^T v`, so its value at a step is linear in them. Spectrum fits all
    values of a run, up to 100; a schedule has at most 4 weights per entry. The ridge also shrinks constants a little.
    """
    _whole(degree, "degree", 0, 16)
    _whole(values, "values", 1, MOST_WEIGHTS)
    shrinkage = _number(ridge, "ridge", above=0.0)
    share = _number(blend, "blend")
    if not 0 <= share <= 1:
        raise ScheduleError(f"blend: expected 0 ... 1, got {share}")

    def basis(times: Sequence[int]) -> NDArray[np.float64]:
        at = 2.0 * np.array(times, dtype=np.float64) / steps - 1.0
        return chebyshev.chebvander(at, degree).astype(np.float64)

    def rule(step: int, history: Sequence[int]) -> NDArray[np.float64]:
        window = list(history[:values])
        x = basis(window)
        fitted = basis([step])[0] @ np.linalg.solve(x.T @ x + shrinkage * np.eye(degree + 1), x.T)
        local = taylor_terms(step, window, 1).sum(axis=0)
        made: NDArray[np.float64] = share * fitted + (1.0 - share) * local
        return made

    return rule


def ratios_rule(steps: int, ratios: object) -> Rule:
    """`ratios[s + 1] * ... * ratios[t]`, one weight, for an entry of step t whose site was last computed at step s.

    `ratios[t]` is the mean magnitude of the residual of step t divided by that of step t - 1, as MagCache measures it
    (arXiv 2506.09045). The product scales a residual to the magnitude that is expected of it; MagCache itself decides
    by it when to compute, and reuses the residual unscaled. `ratios[0]` is not used.
    """
    numbers = [_number(ratio, f"ratios[{i}]", above=0.0) for i, ratio in enumerate(check_sequence(ratios, "ratios"))]
    if len(numbers) != steps:
        raise ScheduleError(f"ratios: expected one per step ({steps}), got {len(numbers)}")
    return lambda step, history: np.array([np.prod(numbers[history[0] + 1 : step + 1])])


def rule_of(method: str, settings: Mapping[str, object], steps: int) -> Rule | None:
    """The rule of a method with the settings that `Schedule.with_...` records; None if it is none of these rules.

    Raises:
        ScheduleError: a setting has a value that the rule cannot have.
    """
    rules: dict[str, tuple[Callable[..., Rule], set[str]]] = {
        "taylor": (taylor_rule, {"order", "since"}),
        "hermite": (hermite_rule, {"order", "contraction", "since"}),
        "chebyshev": (lambda **given: chebyshev_rule(steps, **given), {"degree", "ridge", "blend", "values"}),
        "ratios": (lambda **given: ratios_rule(steps, **given), {"ratios"}),
    }
    make, names = rules.get(method, (None, set()))
    return make(**settings) if make is not None and set(settings) == names else None


def _whole(value: object, field: str, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" ... {most}"
        raise ScheduleError(f"{field}: expected a whole number of {least}{upper or ' or more'}, got {value!r}")


def _number(value: object, field: str, above: float | None = None) -> float:
    number = check_number(value, field)
    if above is not None and number <= above:
        raise ScheduleError(f"{field}: expected a number above {above:g}, got {number}")
    return number
