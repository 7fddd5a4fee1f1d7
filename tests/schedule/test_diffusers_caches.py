"""TaylorSeer's and MagCache's schedules against the hooks of diffusers, and traces of decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

SITES = ["blocks.0.attn", "blocks.0.ff"]
FLUX = [1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562]
FLUX += [1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359]
FLUX += [0.89062]


@pytest.mark.parametrize("settings", [{}, {"cache_interval": 3, "disable_cache_before_step": 5}, {"max_order": 3}])
@pytest.mark.parametrize("after", [None, 17])
def test_taylorseer_computes_the_steps_of_the_hook(settings: dict[str, int], after: int | None) -> None:
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks.hooks import CacheContext, StateManager
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook, TaylorSeerState

    config = TaylorSeerCacheConfig(**settings, disable_cache_after_step=after)
    manager = StateManager(TaylorSeerState, (), {})
    manager.set_context(CacheContext("run"))
    hook = TaylorSeerCacheHook(
        config.cache_interval, config.disable_cache_before_step, torch.float32, manager, config.disable_cache_after_step
    )
    expected = [bool(hook._measure_should_compute()[0]) for _ in range(20)]
    schedule = Schedule.from_taylorseer(config, steps=20, sites=SITES)
    assert schedule.compute[:, 0].tolist() == expected
    masked = Schedule.from_array(schedule.compute, SITES, made_by=schedule.made_by)
    assert schedule == masked.with_taylor(config.max_order)
    fields = {**settings, "disable_cache_after_step": after}
    assert Schedule.from_taylorseer(fields, steps=20, sites=SITES) == schedule


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"interval": 2}, "config: 'interval' decides about no step"),
        ({"cache_interval": 0}, "cache_interval: expected a whole number of at least 1, got 0"),
        ({"max_order": 4}, r"order: expected a whole number of 1 \.\.\. 3, got 4"),
        ({"disable_cache_before_step": 0}, "compute: step 0 reuses"),
        (3, "config: expected a TaylorSeerCacheConfig or a mapping, got a int without cache_interval"),
    ],
)
def test_configs_that_are_refused(config: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_taylorseer(config, steps=8, sites=SITES)


@pytest.mark.parametrize("steps", [28, 20, 50])
@pytest.mark.parametrize(
    ("threshold", "skips", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.0, 3, 0.2), (9, 2, 0.3)]
)
def test_magcache_computes_the_steps_of_the_hook(steps: int, threshold: float, skips: int, retention: float) -> None:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(threshold, skips, retention, steps, FLUX)
    schedule = Schedule.from_magcache(
        FLUX, steps=steps, sites=SITES, threshold=threshold, max_skip_steps=skips, retention_ratio=retention
    )
    assert schedule.compute[:, 0].tolist() == decisions(config, steps)
    assert schedule.weights is None
    if steps == 28:
        assert schedule.with_ratios(FLUX).most_weights == 1


def decisions(config: Any, steps: int) -> list[bool]:
    """Which steps the hooks of diffusers compute: a transformer of two blocks that count their calls."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.hooks.mag_cache import apply_mag_cache

    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return hidden_states + 1

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block(), Block()])

    TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))
    model = Transformer()
    apply_mag_cache(model, config)
    made = []
    for _ in range(steps):
        before = getattr(model.blocks[1], "calls", 0)
        hidden = torch.zeros(1, 2, 3)
        for block in model.blocks:
            hidden = block(hidden)
        made.append(getattr(model.blocks[1], "calls", 0) > before)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": []}, "ratios: expected at least one, got none"),
        ({"ratios": ["1"]}, r"ratios\[0\]: expected a number"),
        ({"threshold": "x"}, "threshold: expected a number"),
        ({"max_skip_steps": 0}, "max_skip_steps: expected a whole number of at least 1"),
        ({"retention_ratio": 2}, r"retention_ratio: expected 0 \.\.\. 1, got 2"),
        ({"steps": 0}, "steps: expected a whole number of at least 1"),
    ],
)
def test_magcache_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"ratios": FLUX, "steps": 28, **change}
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_magcache(given.pop("ratios"), sites=SITES, **given)


def test_traces_there_and_back() -> None:
    schedule = Schedule.from_computed_steps([0, 1, 4, 7], steps=9, sites=SITES)
    assert schedule.step_mask() == [1, 1, 0, 0, 1, 0, 0, 1, 0]
    assert schedule.computed_steps() == [0, 1, 4, 7]
    assert Schedule.from_computed_steps(np.array([7, 4, 1, 0]), steps=9, sites=SITES) == schedule


@pytest.mark.parametrize(
    ("computed", "message"),
    [
        ([1, 2], "compute: step 0 reuses"),
        ([0, 0], "computed: step 0 occurs twice"),
        ([0, 9], r"computed: expected whole numbers of 0 \.\.\. 8, got 9"),
        ([0, True], "computed: expected whole numbers"),
        (3, "compute: step 0 reuses"),
    ],
)
def test_traces_that_are_refused(computed: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_computed_steps(computed, steps=9, sites=SITES)
