"""Captures in many threads at once: tracing changes what all threads share, so they wait for each other."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.backend import attach
from tests.models import SITES, stack, stack_call
from tests.tiers import member

STEPS = 4


def schedule_of(model: Any) -> Schedule:
    return Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))


def run_of(denoiser: Any, batch: int = 2) -> torch.Tensor:
    denoiser.reset()
    with torch.no_grad():
        return torch.stack([denoiser(**stack_call(step, batch)) for step in range(STEPS)])


@pytest.mark.parametrize(
    ("lowering", "count"),
    [
        member("plain", 8, id="plain-8", always=False),
        member("fused", 4, id="fused-4", always=True),
        member("plain", 16, id="plain-16", always=False),
        member("fused", 16, id="fused-16", always=False),
    ],
)
def test_many_threads_compile_a_model_each(lowering: str, count: int) -> None:
    """None runs eagerly, and all give what they give alone; calls in threads that only run go on meanwhile."""
    models = [stack(seed=seed) for seed in range(count)]
    alone = [run_of(hrt.compile(model, schedule_of(model), lowering=lowering)) for model in models]
    together = Barrier(count)

    def work(model: Any) -> tuple[torch.Tensor, torch.Tensor, hrt.CompiledModel]:
        compiled = hrt.compile(model, schedule_of(model), lowering=lowering, strict=True)
        together.wait()
        first = run_of(compiled)
        run_of(compiled, batch=3)  # a second plan, captured while others run theirs
        return first, run_of(compiled), compiled

    with warnings.catch_warnings(), ThreadPoolExecutor(count) as pool:
        warnings.simplefilter("error", hrt.FallbackWarning)
        found = list(pool.map(work, models))
    rounding = {"rtol": 0, "atol": 0} if lowering == "plain" else {"rtol": 1e-5, "atol": 1e-5}
    for expected, (first, last, compiled) in zip(alone, found, strict=True):
        torch.testing.assert_close(first, expected, **rounding)
        torch.testing.assert_close(last, expected, **rounding)
        assert len(compiled.report().plans) == 2
        assert compiled.report().fallbacks == ()


def test_both_interfaces_compile_at_once() -> None:
    models = [stack(seed=seed) for seed in range(4)]
    alone = [run_of(hrt.compile(model, schedule_of(model), lowering="plain")) for model in models]
    together = Barrier(len(models))

    def work(index: int) -> torch.Tensor:
        model = models[index]
        if index % 2:
            compiled = hrt.compile(model, schedule_of(model), lowering="plain", strict=True)
            together.wait()
            return run_of(compiled)
        options = {"schedule": schedule_of(model), "lowering": "plain"}
        traced = torch.compile(model, backend="harmonica", options=options)
        together.wait()
        with torch.no_grad():
            first = traced(**stack_call(0))  # makes the session
            attach(traced).reset()
            outputs = [traced(**stack_call(step)) for step in range(STEPS)]
        assert torch.equal(first, outputs[0])
        return torch.stack(outputs)

    try:
        with ThreadPoolExecutor(len(models)) as pool:
            for expected, found in zip(alone, pool.map(work, range(len(models))), strict=True):
                assert torch.equal(found, expected)
    finally:
        dynamo.reset()
