"""Masks made by rules, `bool[steps, sites]`, True = compute.

`Schedule.every`, `random` and `from_mask` make schedules of them, which are checked as all schedules are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_sequence
from harmonica_rt.schedule.site_names import span_of
from harmonica_rt.untrusted.text import quoted

StepMask = str | Sequence[int]
"""1 = compute at this step, 0 = reuse: `"1010"` or `[1, 0, 1, 0]`."""


def site_kind(site: str) -> str:
    """The last component of a site's path that is not a number: `transformer_blocks.3.attn1` -> `attn1`.

    The kind of a span is that of its list of blocks: `transformer_blocks[4:8]` -> `transformer_blocks`.
    """
    span = span_of(site)
    names = [part for part in (span.path if span else site).split(".") if not part.isdigit()]
    return names[-1] if names else site


def check_count(value: object, name: str) -> int:
    """An int of at least 1, or ScheduleError naming the argument."""
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return value


def every_mask(k: int, steps: int, n_sites: int) -> NDArray[np.bool_]:
    """Compute all sites at steps 0, k, 2k, ... and reuse them in between (FORA, arXiv 2407.01425)."""
    rows = np.arange(check_count(steps, "steps")) % check_count(k, "k") == 0
    return np.repeat(rows[:, None], n_sites, axis=1)


def random_mask(cur: float, steps: int, n_sites: int, seed: int) -> NDArray[np.bool_]:
    """Reuse exactly `round(cur * steps * n_sites)` entries, drawn from all steps but the first.

    Raises:
        ScheduleError: `cur` is outside 0 ... (steps - 1) / steps, the possible range when the first step computes all
            sites.
    """
    total = check_count(steps, "steps") * n_sites
    free = total - n_sites
    if not 0 <= cur <= free / total:
        raise ScheduleError(
            f"cur: expected 0 ... {free / total:.4g} ({steps} steps, the first of which computes all), got {cur!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ScheduleError(f"seed: expected a whole number of at least 0, got {seed!r}")
    # random() + stable argsort rather than choice(): numpy is least likely to change its stream
    order = np.argsort(np.random.default_rng(seed).random(free), kind="stable")
    mask = np.ones(total, dtype=np.bool_)
    mask[n_sites + order[: min(round(cur * total), free)]] = False
    return mask.reshape(steps, n_sites)


def step_mask(mask: StepMask | Mapping[str, StepMask], sites: Sequence[str]) -> NDArray[np.bool_]:
    """A mask `[steps, sites]` from one step mask for all sites, or from one per site pattern.

    A pattern matches a site if it is its name, or matches its whole path or its kind (`fnmatch` rules; `*` crosses
    dots). The first matching pattern decides, so `{"attn*": "1010", "*": "1100"}` reads from top to bottom.

    Raises:
        ScheduleError: there are entries other than 0 and 1, masks of unequal length, a site that no pattern matches, or
            a pattern that decides no site (a typo, or hidden by an earlier one).
    """
    if not isinstance(mask, Mapping):
        return np.repeat(mask_column(mask, "mask")[:, None], len(sites), axis=1)
    if not mask:
        raise ScheduleError("mask: expected at least one pattern, got an empty mapping")
    if odd := [pattern for pattern in mask if not isinstance(pattern, str)]:
        raise ScheduleError(f"mask: expected patterns of sites as keys, got {odd[0]!r}")
    columns = {pattern: mask_column(bits, f"mask[{pattern!r}]") for pattern, bits in mask.items()}
    lengths = {pattern: len(bits) for pattern, bits in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ScheduleError(f"mask: the masks must be equally long, one entry per step; got lengths {lengths}")
    chosen = [_first_match(site, columns) for site in sites]
    if idle := [pattern for pattern in columns if pattern not in chosen]:
        raise ScheduleError(
            f"mask: the patterns {idle} decide no site; they match none, or an earlier pattern hides them. "
            f"The kinds are {sorted({site_kind(site) for site in sites})}"
        )
    return np.stack([columns[pattern] for pattern in chosen], axis=1)


def _first_match(site: str, patterns: Mapping[str, object]) -> str:
    for pattern in patterns:
        if site == pattern or fnmatchcase(site, pattern) or fnmatchcase(site_kind(site), pattern):
            return pattern
    raise ScheduleError(
        f"mask: no pattern matches the site {site!r} (kind {site_kind(site)!r}); patterns: {list(patterns)}. "
        f"Add one for it, or '*' as the last"
    )


def mask_column(mask: object, field: str) -> NDArray[np.bool_]:
    """A step mask as bools `[steps]`, or ScheduleError naming `field`."""
    entries = list(mask if isinstance(mask, str) else check_sequence(mask, field))
    for step, entry in enumerate(entries):
        if entry not in (("0", "1") if isinstance(mask, str) else (0, 1)):
            raise ScheduleError(f"{field}: expected only 0 (reuse) and 1 (compute), got {quoted(entry)} at step {step}")
    if not entries:
        raise ScheduleError(f"{field}: expected one entry per step, got none")
    return np.array([entry in (1, "1") for entry in entries], dtype=np.bool_)
