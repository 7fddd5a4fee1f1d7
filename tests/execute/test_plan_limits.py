"""Plans are bounded in number and in bytes, and those of the run at hand stay."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.execute.plan_cache import SHARE
from tests.cuda_double import CudaDouble
from tests.models import Stack, random_schedule, stack, stack_call

STEPS = 4


@pytest.fixture
def model() -> Stack:
    return stack()


def run(compiled: Any, *batches: int) -> None:
    """One run, with a call for each batch in every step."""
    compiled.reset()
    for step in range(STEPS):
        for batch in batches:
            compiled(**stack_call(step, batch=batch))


def batches(compiled: Any) -> list[int]:
    return [key.signature.leaves[0][0][0] for key in compiled.plans]


def compile_with(model: Stack, **limits: Any) -> Any:
    return hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True, **limits)


def test_the_one_unused_longest_goes_until_the_bytes_suffice(model: Stack, caplog: pytest.LogCaptureFixture) -> None:
    whole = compile_with(model)
    for batch in (1, 2, 3):
        run(whole, batch)
    held = {batch: plan.memory.held_bytes for batch, plan in zip(batches(whole), whole.report().plans, strict=True)}
    assert 0 < held[1] < held[2] < held[3]
    compiled = compile_with(model, max_plan_bytes=held[2] + held[3])
    with caplog.at_level(logging.INFO, logger="harmonica_rt"):
        for batch in (1, 2, 1, 3):
            run(compiled, batch)
    assert batches(compiled) == [1, 3]  # 2 was unused longest
    assert any("plans may hold" in line for line in caplog.messages)


def test_the_plan_in_use_is_kept_however_large(model: Stack) -> None:
    compiled = compile_with(model, max_plan_bytes=1)
    for _ in range(2):
        run(compiled, 1)
    assert batches(compiled) == [1]
    run(compiled, 2)
    assert batches(compiled) == [2]


def test_plans_of_the_run_at_hand_are_not_pulled_away(model: Stack) -> None:
    compiled = compile_with(model, max_plans=1)
    compiled.reset()
    stream = compiled.engine.new_stream
    for batch in (1, 2):
        stream(compiled._convention.normalise((), stack_call(0, batch=batch)))
    assert batches(compiled) == [1, 2]
    run(compiled, 2)
    assert batches(compiled) == [2]


def test_without_a_limit_a_share_of_the_gpu_is_kept(model: Stack, cuda: CudaDouble) -> None:
    compiled = compile_with(model, graphs="off")
    total = torch.cuda.get_device_properties(0).total_memory
    for tokens in (400, 401, 402, 403):
        compiled.reset()
        for step in range(STEPS):
            compiled(**stack_call(step, tokens=tokens))
        cuda.synchronize()
    assert 1 <= len(compiled.plans) < 4
    assert compiled.engine.cache.nbytes <= SHARE * total


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_a_byte_is_refused(model: Stack, limit: int) -> None:
    with pytest.raises(HarmonicaError, match="max_plan_bytes must be"):
        compile_with(model, max_plan_bytes=limit)
    options = {"schedule": random_schedule(model, STEPS, seed=1), "max_plan_bytes": limit}
    with pytest.raises(Exception, match="max_plan_bytes must be"):  # dynamo wraps what a backend raises
        torch.compile(model, backend="harmonica", options=options)(**stack_call(0))
