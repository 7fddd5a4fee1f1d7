"""Checks of a schedule's fields. Each check returns the value in the form that is stored, or raises ScheduleError."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harmonica_rt.errors import ScheduleError, SiteError
from harmonica_rt.schedule.site_names import check_disjoint
from harmonica_rt.untrusted.text import one_line, quoted


def check_name(value: object, field: str) -> str:
    """A non-empty string, or ScheduleError naming `field`."""
    if not isinstance(value, str) or not value.strip():
        raise ScheduleError(f"{field}: expected a non-empty string, got {quoted(value)}")
    return check_text(value, field)


def check_text(value: str, field: str) -> str:
    """A string that UTF-8 can encode, or ScheduleError naming `field`; Python strings may hold lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ScheduleError(f"{field}: expected text that UTF-8 can write, got {quoted(value)}") from error
    return value


def check_number(value: object, field: str) -> float:
    """A finite float, or ScheduleError naming `field`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScheduleError(f"{field}: expected a number, got {quoted(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ScheduleError(f"{field}: expected a finite number, got {number}")
    return number


def check_sequence(value: object, field: str) -> Sequence[object]:
    """A list, tuple or array, or ScheduleError naming `field`."""
    if isinstance(value, np.ndarray) and value.ndim:
        return list(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ScheduleError(f"{field}: expected a list, got {type(value).__name__}")
    return value


def check_compute(mask: ArrayLike) -> NDArray[np.bool_]:
    """The mask as bool `[steps, sites]`, or ScheduleError saying what is wrong with it."""
    try:
        array = np.asarray(mask)
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"compute: expected a rectangular array [steps, sites]; numpy says: {error}") from error
    if array.ndim != 2:
        raise ScheduleError(f"compute: expected two dimensions [steps, sites], got shape {array.shape}")
    if 0 in array.shape:
        raise ScheduleError(f"compute: expected at least one step and one site, got shape {array.shape}")
    if array.dtype.kind not in "biu":
        raise ScheduleError(
            f"compute: expected bools or 0/1 integers, got dtype {array.dtype}; "
            f"compare scores with a threshold first (scores > tau)"
        )
    if array.dtype.kind != "b" and (odd := array[(array != 0) & (array != 1)]).size:
        raise ScheduleError(f"compute: expected only 0 (reuse) and 1 (compute), got {odd[0]}")
    return array.astype(np.bool_)


def check_sites(sites: Iterable[object]) -> tuple[str, ...]:
    """Site names that do not overlap, or ScheduleError. Whether a model has them is checked by `sites.check_sites`."""
    if isinstance(sites, str) or not isinstance(sites, Iterable):
        raise ScheduleError(f"sites: expected a list of dotted module paths, got {quoted(sites)}")
    names = tuple(sites)
    if not names:
        raise ScheduleError("sites: expected at least one site, got none")
    if isinstance(sites, set | frozenset):
        raise ScheduleError("sites: expected a list in the order of the columns, got a set, which has no order")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not all(name.split(".")) or any(c.isspace() for c in name):
            raise ScheduleError(
                f"sites[{i}]: expected a dotted module path such as 'blocks.0.attn1', got {quoted(name)}"
            )
    paths = tuple(check_text(str(name), f"sites[{i}]") for i, name in enumerate(names))
    if twice := sorted(path for path, times in Counter(paths).items() if times > 1):
        raise ScheduleError(f"sites: each site may appear only once, got several times: {one_line(', '.join(twice))}")
    try:
        check_disjoint(paths)
    except SiteError as error:
        raise ScheduleError(f"sites: {error}") from error
    return paths


def check_timesteps(timesteps: object, steps: int) -> tuple[float, ...]:
    """One finite float per step, or ScheduleError."""
    values = check_sequence(timesteps, "timesteps")
    if len(values) != steps:
        raise ScheduleError(f"timesteps: expected one per step ({steps}), got {len(values)}; leave them out if unknown")
    return tuple(check_number(value, f"timesteps[{i}]") for i, value in enumerate(values))


def check_scores_shape(scores: Sequence[Sequence[float] | None], shape: tuple[int, ...]) -> None:
    """Raise ScheduleError unless there is one row per step, each None or with one score per site."""
    if len(scores) != shape[0]:
        raise ScheduleError(f"made_by.scores: expected one row per step ({shape[0]}), got {len(scores)}")
    for step, row in enumerate(scores):
        if row is not None and len(row) != shape[1]:
            raise ScheduleError(f"made_by.scores, step {step}: expected one per site ({shape[1]}), got {len(row)}")
