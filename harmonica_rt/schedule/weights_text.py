"""The weights as a schedule file has them: one item per step, aligned with `compute`.

An item is a list, the weights that all reused sites of the step share, newest value first; an object with such a list
for each reused site, where these differ; or an empty list, where a step reuses nothing.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_number, check_sequence
from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.weights import MOST_WEIGHTS, Weights, reach
from harmonica_rt.untrusted import strict_json
from harmonica_rt.untrusted.text import one_line, quoted


def weights_lines(schedule: ScheduleData) -> list[str]:
    """The items as JSON, one per step; an item that is an object has one line per reused site."""
    return [
        _item(each, row, schedule.sites) for each, row in zip(schedule.entry_weights, schedule.compute, strict=True)
    ]


def _item(weights: Weights, computes: NDArray[np.bool_], sites: tuple[str, ...]) -> str:
    lists = {site: _list(own) for site, own, computed in zip(sites, weights, computes, strict=True) if not computed}
    if len(set(lists.values())) <= 1:
        return next(iter(lists.values()), "[]")
    lines = [f"      {json.dumps(site)}: {own}" for site, own in lists.items()]
    return "{\n" + ",\n".join(lines) + "\n    }"


def _list(weights: Weights) -> str:
    return f"[{', '.join(shortest(weight) for weight in weights[: int(reach(weights))])}]"


def shortest(value: float) -> str:
    """A number that float32 holds, with the fewest digits that a reader of doubles rounds back to it."""
    numbers = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    with np.errstate(over="ignore"):
        number = next(number for number in numbers if np.float32(number) == np.float32(value))
    return repr(number).removesuffix(".0")


def parse_weights(items: object, compute: NDArray[np.bool_], sites: tuple[str, ...]) -> Weights:
    """The weights `[steps, sites, order]` that the field `weights` of a file holds.

    Raises:
        ScheduleError: there is not one item per step, an item does not fit its row of `compute`, or a weight is not a
            finite number. The message names the step and the site.
    """
    rows = check_sequence(items, "weights")
    if len(rows) != len(compute):
        raise ScheduleError(f"weights: expected one item per step ({len(compute)}), got {len(rows)}")
    weights = np.zeros((*compute.shape, MOST_WEIGHTS))
    for step, (row, computes) in enumerate(zip(rows, compute, strict=True)):
        field = f"weights, step {step}"
        if isinstance(row, dict):
            _check_names(row, computes, sites, field)
            for site, own in row.items():
                numbers = _numbers(own, f"{field}, {one_line(site)}")
                weights[step, sites.index(site), : len(numbers)] = numbers
        elif isinstance(row, list) and not row and computes.all():
            continue
        elif computes.all():
            raise ScheduleError(f"{field}: expected [], since the step computes all sites, got {quoted(row)}")
        else:
            numbers = _numbers(row, field)
            weights[step, ~computes, : len(numbers)] = numbers
    return weights


def _check_names(row: dict[str, object], computes: NDArray[np.bool_], sites: tuple[str, ...], field: str) -> None:
    reused = [site for site, computed in zip(sites, computes, strict=True) if not computed]
    if odd := [site for site in row if site not in reused]:
        why = "is computed at this step and has no weights" if odd[0] in sites else "is not a site of this schedule"
        raise ScheduleError(f"{field}: {quoted(odd[0])} {why}")
    if missing := [site for site in reused if site not in row]:
        raise ScheduleError(f"{field}: no weights for {quoted(missing[0])}, which is reused; [1] reuses it plainly")


def _numbers(value: object, field: str) -> list[float]:
    if not isinstance(value, list):
        raise ScheduleError(f"{field}: expected a list of weights, got {strict_json.type_name(value)}")
    if not 1 <= len(value) <= MOST_WEIGHTS:
        raise ScheduleError(
            f"{field}: expected 1 to {MOST_WEIGHTS} weights, newest value first, got {len(value)}; [1] is plain reuse"
        )
    return [check_number(weight, field) for weight in value]
