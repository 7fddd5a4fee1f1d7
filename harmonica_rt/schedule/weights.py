"""The weights of a schedule's entries: a reused value is `sum_j weights[j] * (the j-th latest computed value)`.

Arrays are `float64[steps, order]`, shared by the sites of a step, or `float64[steps, sites, order]`; `[1]` is plain
reuse. Values are rounded to float32, the precision in which they are applied.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.untrusted.text import quoted

MOST_WEIGHTS = 4  # per entry

Weights = NDArray[np.float64]


def check_weights(weights: ArrayLike, compute: NDArray[np.bool_], sites: tuple[str, ...]) -> Weights | None:
    """The weights in their simplest equal form; None if every entry is plainly reused.

    Weights of computed entries are dropped (0). What all reused sites of each step share is kept once per step.

    Args:
        weights: `[steps, order]` or `[steps, sites, order]`, newest value first.
        compute: `[steps, sites]`, True = compute.
        sites: the names of the sites.

    Raises:
        ScheduleError: the shape is wrong, a number is not finite, all weights of a reused entry are 0, or an entry has
            weights for more values than were computed before it.
    """
    array = _checked_array(weights, compute.shape)
    each = np.where(compute[:, :, None], 0.0, array if array.ndim == 3 else array[:, None, :])
    _check_reach(each, compute, sites)
    used = np.flatnonzero(each.any(axis=(0, 1)))
    each = each[:, :, : int(used[-1]) + 1 if used.size else 1]
    if np.array_equal(each, np.where(compute, 0.0, 1.0)[:, :, None]):
        return None
    first = np.argmin(compute, axis=1)  # a reused site of each step that has one
    shared = each[np.arange(len(each)), first]
    same = np.array_equal(each, np.where(compute[:, :, None], 0.0, shared[:, None, :]))
    return shared if same else each


def per_entry(weights: Weights | None, compute: NDArray[np.bool_]) -> Weights:
    """The weights of each entry, `[steps, sites, order]`; 0 where it is computed."""
    if weights is None:
        weights = np.ones((len(compute), 1))
    return np.where(compute[:, :, None], 0.0, weights if weights.ndim == 3 else weights[:, None, :])


def same_weights(one: Weights | None, other: Weights | None) -> bool:
    """Whether two schedules of equal masks have equal weights."""
    return np.array_equal(one, other) if one is not None and other is not None else one is other


def reach(weights: Weights) -> NDArray[np.int64]:
    """How many of the latest values each entry uses, from its weights `[..., order]`; 0 where there are none."""
    place = np.arange(1, weights.shape[-1] + 1)
    used: NDArray[np.int64] = np.where(weights != 0.0, place, 0).max(axis=-1).astype(np.int64)
    return used


def computed_before(compute: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`[steps, sites]`: in how many earlier steps each site was computed."""
    return (np.cumsum(compute, axis=0) - compute).astype(np.int64)


def _checked_array(weights: ArrayLike, shape: tuple[int, ...]) -> Weights:
    try:
        array = np.asarray(weights)
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"weights: expected a rectangular array; numpy says: {error}") from error
    steps, sites = shape
    if array.ndim not in (2, 3) or array.shape[:-1] not in ((steps,), (steps, sites)):
        raise ScheduleError(
            f"weights: expected shape [{steps}, order] or [{steps}, {sites}, order], got {list(array.shape)}"
        )
    if not 1 <= array.shape[-1] <= MOST_WEIGHTS:
        raise ScheduleError(f"weights: expected 1 to {MOST_WEIGHTS} per entry, got {array.shape[-1]}")
    if array.dtype.kind not in "iuf":
        raise ScheduleError(f"weights: expected numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        rounded: Weights = array.astype(np.float32).astype(np.float64) + 0.0  # + 0.0: no "-0.0"
    if not np.isfinite(rounded).all():
        at = tuple(np.argwhere(~np.isfinite(rounded))[0])
        raise ScheduleError(f"weights, step {at[0]}: expected finite numbers that float32 can hold, got {array[at]}")
    return rounded


def _check_reach(each: Weights, compute: NDArray[np.bool_], sites: tuple[str, ...]) -> None:
    used, there = reach(each), computed_before(compute)
    for wrong, what in (
        ((used == 0) & ~compute, "are all 0 in float32; compute the entry, or give it another weight"),
        (used > there, "use more values than were computed before it"),
    ):
        if wrong.any():
            step, site = np.argwhere(wrong)[0]
            raise ScheduleError(
                f"weights, step {step}: those of {quoted(sites[site])}, {each[step, site].tolist()}, {what}"
                + (f" ({there[step, site]})" if used[step, site] else "")
            )
