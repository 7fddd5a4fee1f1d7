"""Differences of a site's latest values, as weights: what Taylor-like methods are made of.

With the steps `s_0 > s_1 > ...` at which a site was computed and its values `v_0, v_1, ...` there,

    d_0(k) = v_k,    d_i+1(k) = (d_i(k) - d_i(k+1)) / (s_k - s_k+1)

as TaylorSeer computes them (arXiv 2503.06923; `derivative_approximation` in its code, `TaylorSeerState.update` in
diffusers, `TaylorSeerCalibrator` in cache-dit). Every difference is divided by the distance of the two latest computed
steps, so from the second on these are derivatives only where the steps are evenly spaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial

import numpy as np
from numpy.typing import NDArray


def difference_weights(history: Sequence[int], order: int, since: int = 0) -> NDArray[np.float64]:
    """The differences `d_0(0), d_1(0), ...` as weights of the values, `[differences, values]`.

    There are at most `order + 1` of them and at most one per value. A value that was computed at a step before `since`
    is not subtracted from: it has no difference of its own, as during the warm-up steps of TaylorSeer.
    """
    count = min(order + 1, len(history))
    level: list[NDArray[np.float64]] = list(np.eye(len(history))[:count])  # d_i(k) by k
    found = [level[0]]
    while len(found) < count:
        pairs = list(zip(level, level[1:], history, history[1:], strict=False))
        level = [(a - b) / (newer - older) for a, b, newer, older in pairs if newer >= since]
        if not level:
            break
        found.append(level[0])
    return np.stack(found)


def taylor_terms(step: int, history: Sequence[int], order: int, since: int = 0) -> NDArray[np.float64]:
    """The terms of a Taylor series as weights, `[terms, values]`: term i is `x^i / i! * d_i(0)`, `x = step - s_0`."""
    differences = difference_weights(history, order, since)
    distance = float(step - history[0])
    scales = np.array([distance**i / factorial(i) for i in range(len(differences))])
    terms: NDArray[np.float64] = differences * scales[:, None]
    return terms
