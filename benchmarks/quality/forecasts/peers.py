"""TaylorSeer of diffusers and of cache-dit on the bundled pipeline, at most as fast in theory as `every(k)`.

diffusers has no `enable_cache` for the bundled model's class, so `apply_taylorseer_cache` puts its hooks on, and as
`DiTPipeline` sets no cache context, it is set here. The lite mode predicts a module named `proj_out`; DiT's last
projection is `proj_out_2`, so patterns name it. cache-dit computes the first block in every step, and so fewer steps
in full.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import CacheMixin, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, apply_taylorseer_cache

from benchmarks.latency.providers.base import as_bits, evenly, fewest_computed
from benchmarks.quality.forecasts.methods import STEPS, Setting
from harmonica_rt.graph.flops import flop_counter

PATTERNS = {  # what is predicted -> patterns of modules that are not run, and of those that are predicted
    "sub-layers": (None, [r"transformer_blocks\.\d+\.(attn1|ff)"]),
    "last projection": ([r"transformer_blocks\.\d+"], ["proj_out_2"]),
}
_HOOK = "taylorseer_cache"
_ANY_DIFFERENCE = 1e9  # a threshold above every difference

Call = Callable[..., Any]
"""Called like the pipeline, for one run."""


@contextmanager
def _diffusers(pipeline: Any, k: int, *, predicts: str, order: int) -> Iterator[Call]:
    model = pipeline.transformer
    skipped, predicted = PATTERNS[predicts]
    config = TaylorSeerCacheConfig(
        cache_interval=k,
        disable_cache_before_step=1,  # then it computes step 0 and every k-th step from step 2 on
        max_order=order,
        taylor_factors_dtype=torch.float32,
        skip_predict_identifiers=skipped,
        cache_identifiers=predicted,
    )
    apply_taylorseer_cache(model, config)
    registry: Any = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()

    def call(**arguments: Any) -> Any:
        registry.reset_stateful_hooks()
        with CacheMixin.cache_context(model, "run"):
            return pipeline(**arguments)

    try:
        yield call
    finally:
        registry.remove_hook(_HOOK, recurse=True)
        registry.invalidate_child_registries_cache()


@contextmanager
def _cache_dit(pipeline: Any, k: int, *, warm_up: int, order: int) -> Iterator[Call]:
    cache_dit = importlib.import_module("cache_dit")
    pipeline.__class__ = type(type(pipeline).__name__, (type(pipeline),), {})  # it replaces the call of the class
    blocks = len(pipeline.transformer.transformer_blocks)
    count = fewest_computed(blocks, 1, STEPS, STEPS / len(range(0, STEPS, k)))
    spread = evenly(count - warm_up + 1, STEPS - warm_up + 1)[1:]
    cache_dit.enable_cache(
        pipeline,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=_ANY_DIFFERENCE,
            enable_separate_cfg=False,
            num_inference_steps=STEPS,
            steps_computation_mask=as_bits([True] * warm_up + list(spread)),
            steps_computation_policy="static",
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )
    try:
        yield pipeline
    finally:
        cache_dit.disable_cache(pipeline)


PEERS: dict[str, Callable[..., AbstractContextManager[Call]]] = {"diffusers": _diffusers, "cache-dit": _cache_dit}
"""Peer -> (pipeline, k, **setting) -> a context in which the pipeline runs with the peer's cache."""

SETTINGS: dict[str, list[Setting]] = {
    "diffusers": [{"predicts": predicts, "order": order} for predicts in PATTERNS for order in (1, 2)],
    "cache-dit": [{"warm_up": warm_up, "order": order} for warm_up in (1, 3) for order in (1, 2)],
}
"""Those that the best is chosen from. `warm_up` steps are computed first, the others are spread evenly."""


def why_not(peer: str) -> str | None:
    """None if the peer can be measured here, else the reason."""
    return "not installed" if peer == "cache-dit" and importlib.util.find_spec("cache_dit") is None else None


def counted_speedup(model: Any, run: Callable[[], object]) -> float:
    """FLOPs of `STEPS` calls that compute everything, divided by those of the calls of the model in `run`."""
    counts: list[int] = []
    counters: list[Any] = []

    def begins(*_: Any) -> None:
        counters.append(flop_counter())
        counters[-1].__enter__()

    def ends(*_: Any) -> None:
        counters[-1].__exit__(None, None, None)
        counts.append(int(counters[-1].get_total_flops()))

    handles = [model.register_forward_pre_hook(begins), model.register_forward_hook(ends)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return max(counts) * STEPS / sum(counts)
