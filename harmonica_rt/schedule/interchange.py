"""Schedules in the formats of other tools: SmoothCache's JSON, step masks, and lists of computed steps.

SmoothCache (arXiv 2411.10510) keeps a list of 0 and 1 for each `component`, or for each `component-block`: 1 = compute.
A component is the last name of a module's path and a block the name before it. The list of a block takes precedence
over that of its component, and a module without a list computes at every step.

cache-dit's `steps_computation_mask` is one list of 0 and 1 for the whole model: 1 = compute the step. A trace of the
decisions of a cache that decides while it runs (TeaCache, First Block Cache) is the list of the steps that it computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.checks import check_sequence
from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.format import read_bytes, read_object
from harmonica_rt.schedule.producers import check_count, mask_column
from harmonica_rt.schedule.site_names import is_module
from harmonica_rt.untrusted.text import one_line, quoted


def read_smoothcache(source: str, sites: tuple[str, ...], components: Mapping[str, str]) -> NDArray[np.bool_]:
    """The mask `[steps, sites]`, True = compute, of the SmoothCache file `source`; see `Schedule.from_smoothcache`.

    Raises:
        ScheduleFileNotFoundError: there is no such file.
        ScheduleError: the file is not of this format, or has lists that decide no site.
    """
    return smoothcache_mask(read_object(read_bytes(source), "not a schedule of SmoothCache"), sites, components)


def smoothcache_mask(
    lists: Mapping[str, object], sites: Sequence[str], components: Mapping[str, str]
) -> NDArray[np.bool_]:
    """The mask `[steps, sites]` that SmoothCache's `lists` define for these sites.

    Args:
        lists: the content of the file.
        sites: dotted module paths.
        components: maps names of components in the file to those of the model's modules, where they differ.

    Raises:
        ScheduleError: the values are not lists of 0 and 1 of equal length, or a list decides no site.
    """
    columns = {key: mask_column(check_sequence(value, one_line(key)), one_line(key)) for key, value in lists.items()}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ScheduleError(f"expected lists of one length, one entry per step; got lengths {quoted(lengths)}")
    steps = next(iter(lengths.values()))
    names = {ours: theirs for theirs, ours in components.items()}
    keys = [[key for key in _keys(site, names) if key in columns] for site in sites]
    if idle := columns.keys() - {found[0] for found in keys if found}:
        raise ScheduleError(
            f"the lists {quoted(sorted(idle))} decide no site: expected the last name of a site's path, as in "
            f"{quoted(sites[0])}, with or without '-' and the block's number; pass components={{name in the file: "
            f"name in the model}} where they differ"
        )
    return np.stack([columns[found[0]] if found else np.ones(steps, np.bool_) for found in keys], axis=1)


def smoothcache_text(schedule: ScheduleData, components: Mapping[str, str]) -> str:
    """The file that SmoothCache reads: one list per component if all its blocks agree, else one per block."""
    _check_no_weights(schedule, "SmoothCache's files hold")
    if odd := [site for site in schedule.sites if not is_module(site)]:
        raise ScheduleError(f"SmoothCache's files hold the outputs of modules, not {odd[0]!r}")
    names = {ours: theirs for theirs, ours in components.items()}
    blocks: dict[str, NDArray[np.bool_]] = {}
    kinds: dict[str, list[str]] = {}
    for site, column in zip(schedule.sites, schedule.compute.T, strict=True):
        block, component = _keys(site, names)
        if block in blocks and not np.array_equal(blocks[block], column):
            raise ScheduleError(f"{site}: its SmoothCache name {block!r} is also that of a site with different entries")
        blocks[block] = column
        kinds.setdefault(component, []).append(block)
    lists: dict[str, NDArray[np.bool_]] = {}
    for component, of_kind in kinds.items():
        agree = all(np.array_equal(blocks[block], blocks[of_kind[0]]) for block in of_kind)
        lists |= {component: blocks[of_kind[0]]} if agree else {block: blocks[block] for block in of_kind}
    lines = [f"  {json.dumps(key)}: {json.dumps(column.astype(int).tolist())}" for key, column in lists.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def step_mask_of(schedule: ScheduleData) -> list[int]:
    """One entry, 0 or 1, per step.

    Raises:
        ScheduleError: a step computes some sites and reuses others, or the schedule has weights.
    """
    _check_no_weights(schedule, "a step mask holds")
    if mixed := mixed_steps(schedule):
        reused = int((~schedule.compute[mixed[0]]).sum())
        raise ScheduleError(
            f"step {mixed[0]} reuses {reused} of {len(schedule.sites)} sites and computes the others; a step mask "
            f"has whole steps only ({len(mixed)} of {schedule.steps} steps are mixed)"
        )
    return [int(step) for step in schedule.compute[:, 0]]


def mixed_steps(schedule: ScheduleData) -> list[int]:
    """The steps that compute some sites and reuse others."""
    return np.flatnonzero(schedule.compute.any(axis=1) & ~schedule.compute.all(axis=1)).tolist()


def mask_of_steps(computed: Iterable[int], steps: int, n_sites: int) -> NDArray[np.bool_]:
    """The mask `[steps, sites]` that computes whole steps: those that are listed."""
    count = check_count(steps, "steps")
    column = np.zeros(count, dtype=np.bool_)
    for step in list(computed) if isinstance(computed, Iterable) else [computed]:
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < count:
            raise ScheduleError(f"computed: expected whole numbers of 0 ... {count - 1}, got {quoted(step)}")
        if column[step]:
            raise ScheduleError(f"computed: step {step} occurs twice")
        column[step] = True
    return np.repeat(column[:, None], n_sites, axis=1)


def _check_no_weights(schedule: ScheduleData, what: str) -> None:
    if schedule.weights is not None:
        raise ScheduleError(
            f"this schedule has weights, and {what} none; with_weights(None) drops them, and reuses plainly"
        )


def _keys(site: str, names: Mapping[str, str]) -> tuple[str, str]:
    """SmoothCache's names for a site, the most specific first."""
    *_, block, own = ["", *site.split(".")]
    component = names.get(own, own)
    return f"{component}-{block}", component
