"""The settings of cache-dit, as far as they define a static schedule.

cache-dit computes the steps that `steps_computation_mask` marks with 1. At the others it computes the first
`Fn_compute_blocks` and the last `Bn_compute_blocks` blocks and reuses the rest, with the weights of TaylorSeer if
`enable_taylorseer` says so. With `steps_computation_policy: dynamic`, its default, it decides about the others from
their values while it runs, which no static schedule can do.

It caches the residual of all blocks in between as one value. Here each site has its own, with the same weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule.data import ScheduleData
from harmonica_rt.schedule.flat_yaml import read_options
from harmonica_rt.schedule.format import read_bytes
from harmonica_rt.schedule.interchange import mixed_steps
from harmonica_rt.schedule.producers import mask_column
from harmonica_rt.schedule.weights import MOST_WEIGHTS
from harmonica_rt.untrusted.text import one_line, quoted

SINCE = 2  # its TaylorSeer subtracts no value from that of step 0 or 1
ORDERS = range(1, MOST_WEIGHTS)

_MEANT = (
    *("steps_computation_mask", "steps_computation_policy", "num_inference_steps"),
    *("Fn_compute_blocks", "Bn_compute_blocks", "enable_taylorseer", "taylorseer_order"),
)
# what a static mask overrides, or what does not change which steps and blocks are computed
_IGNORED = (
    *("cache_type", "residual_diff_threshold", "max_warmup_steps", "warmup_interval", "max_cached_steps"),
    *("max_continuous_cached_steps", "enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate"),
    *("enable_encoder_taylorseer", "taylorseer_cache_type", "calibrator_cache_type"),
    *("l1_hidden_states_diff_threshold", "important_condition_threshold", "downsample_factor"),
)
_REFUSED = {
    "enable_dmd": "is not linear in the latest values",
    "enable_foca": "is not linear in the latest values",
    "force_refresh_step_hint": "forgets values in mid-run",
}


@dataclass(frozen=True)
class Settings:
    """What the settings define.

    Attributes:
        computed: one entry per step, True = compute all blocks.
        first, last: how many blocks at either end are computed at the other steps.
        order: that of TaylorSeer; 0 for plain reuse.
    """

    computed: NDArray[np.bool_]
    first: int
    last: int
    order: int

    def mask(self, sites: Sequence[str]) -> NDArray[np.bool_]:
        """The mask `[steps, sites]`."""
        return self.computed[:, None] | always_computed(sites, self.first, self.last)[None, :]


def read_settings(path: str) -> Mapping[str, object]:
    """The options in a file of cache-dit."""
    return read_options(read_bytes(path), "cache_config", "not a file of options of cache-dit")


def settings_of(options: Mapping[str, object]) -> Settings:
    """What options of cache-dit define; those of `cache_config` may be in a mapping of that name."""
    inner = options.get("cache_config", options)
    if not isinstance(inner, Mapping):
        raise ScheduleError(f"cache_config: expected a mapping of options, got {quoted(inner)}")
    given = {str(name): value for name, value in inner.items() if value is not None}
    for name in given:
        if name not in (*_MEANT, *_IGNORED, *_REFUSED):
            near = difflib.get_close_matches(name, [*_MEANT, *_IGNORED], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ScheduleError(f"{one_line(name)}: no option of cache-dit that is known here{hint}")
        if name in _REFUSED and given[name] is not False:
            raise ScheduleError(f"{name}: {_REFUSED[name]}, which no static schedule can express; turn it off")
    computed = _computed(given)
    order = 0
    if _flag(given, "enable_taylorseer"):
        order = _count(given, "taylorseer_order", 1)
        if order not in ORDERS:
            raise ScheduleError(
                f"taylorseer_order: expected 1 ... {ORDERS[-1]}, which 4 weights can express, got {order}"
            )
    return Settings(computed, _count(given, "Fn_compute_blocks", 8), _count(given, "Bn_compute_blocks", 0), order)


def always_computed(sites: Sequence[str], first: int, last: int) -> NDArray[np.bool_]:
    """`[sites]`: which sites are in the first or last blocks.

    Raises:
        ScheduleError: the sites are in several lists of blocks, so it is unclear which blocks are the first ones.
    """
    if not first and not last:
        return np.zeros(len(sites), dtype=np.bool_)
    blocks = [_block(site) for site in sites]
    lists = sorted({block.rpartition(".")[0] for block in blocks})
    if len(lists) > 1:
        raise ScheduleError(
            f"Fn_compute_blocks, Bn_compute_blocks: the sites are in several lists of blocks, {quoted(lists)}, and "
            "which blocks are the first depends on cache-dit's adapter for the model; from_mask takes masks by kind"
        )
    order = list(dict.fromkeys(blocks))
    chosen = {*order[:first], *order[len(order) - min(last, len(order)) :]}
    return np.array([block in chosen for block in blocks], dtype=np.bool_)


def text_of(schedule: ScheduleData, order: int) -> str:
    """The file of options (YAML) for a schedule whose weights are those of TaylorSeer of this order, 0 for none.

    Raises:
        ScheduleError: a step computes other sites than all, or than those of the first and last blocks.
    """
    computed: NDArray[np.bool_] = np.array(schedule.compute.all(axis=1))
    first, last = _ends(schedule, computed)
    options = {
        "num_inference_steps": str(schedule.steps),
        "steps_computation_mask": str([int(step) for step in computed]),
        "steps_computation_policy": "static",
        "Fn_compute_blocks": str(first),
        "Bn_compute_blocks": str(last),
        "enable_taylorseer": "true" if order else "false",
    }
    if order:
        options["taylorseer_order"] = str(order)
    return "cache_config:\n" + "".join(f"  {name}: {value}\n" for name, value in options.items())


def other_weights() -> ScheduleError:
    """The error for weights that cache-dit has no setting for."""
    return ScheduleError(
        f"the weights are not those of with_taylor(order, since={SINCE}), and cache-dit has no settings for others; "
        "with_weights(None) drops them"
    )


def _ends(schedule: ScheduleData, computed: NDArray[np.bool_]) -> tuple[int, int]:
    """How many blocks at either end are computed at the steps that reuse something."""
    reusing = schedule.compute[~computed]
    if not len(reusing):
        return 1, 0
    names = [_block(site) for site in schedule.sites]
    reused = {name for name, computes in zip(names, reusing[0], strict=True) if not computes}
    places = [place for place, name in enumerate(dict.fromkeys(names)) if name in reused]
    first, last = places[0], len(set(names)) - 1 - places[-1]
    if first and (always_computed(schedule.sites, first, last) == reusing).all():
        return first, last
    if not mixed_steps(schedule):
        raise ScheduleError(
            "cache-dit computes at least the first block at every step, and this schedule reuses whole steps; "
            "compute the first block's sites at every step, or export the steps alone: "
            "schedule.with_weights(None).step_mask()"
        )
    raise ScheduleError(
        "a reused step of cache-dit computes the sites in its first and last blocks and no others, the same at every "
        f"step; step {int(np.flatnonzero(~computed)[0])} or a later one does not"
    )


def _block(site: str) -> str:
    """The path of the block that a site is in: up to the first number; the site itself if it has none."""
    parts = site.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else site


def _computed(given: Mapping[str, object]) -> NDArray[np.bool_]:
    mask = given.get("steps_computation_mask")
    if mask is None or isinstance(mask, str):
        what = "there is none" if mask is None else f"got the name {quoted(mask)}"
        raise ScheduleError(
            f"steps_computation_mask: expected a list of 0 and 1, {what}; cache_dit.steps_mask(...) makes the list"
        )
    column = mask_column(mask, "steps_computation_mask")
    policy = given.get("steps_computation_policy", "dynamic")
    if policy != "static":
        raise ScheduleError(
            f"steps_computation_policy: {quoted(policy)} decides from values while the model runs, which no static "
            "schedule can do; set it to 'static'"
        )
    steps = _count(given, "num_inference_steps", len(column))
    if steps != len(column):
        raise ScheduleError(f"steps_computation_mask: expected one entry per step ({steps}), got {len(column)}")
    return column


def _count(given: Mapping[str, object], name: str, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ScheduleError(f"{name}: expected a whole number of at least 0, got {quoted(value)}")
    return value


def _flag(given: Mapping[str, object], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ScheduleError(f"{name}: expected true or false, got {quoted(value)}")
    return value
