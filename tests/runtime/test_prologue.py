"""Hoisted values in runs: foreseen timesteps, other timesteps, other weights, other requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.errors import RunError
from harmonica_rt.runtime import conditioning
from harmonica_rt.runtime.prologue import LoweredPrologue
from tests.passes.test_hoist import SITES, STEPS, Conditioned, call_of


@pytest.fixture
def model() -> Conditioned:
    torch.manual_seed(0)
    return Conditioned().eval()


def compiled_for(model: nn.Module) -> CompiledModel:
    schedule = hrt.Schedule.from_array([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 1, 1]], sites=SITES)
    return hrt.compile(model, schedule, lowering="fused", strict=True)


def check_run(compiled: CompiledModel, calls: list[dict[str, torch.Tensor]]) -> None:
    """A whole run against the reference."""
    truth = hrt.reference(compiled.model, compiled.schedule)
    compiled.reset()
    for call in calls:
        torch.testing.assert_close(compiled(**call), truth(**call))


def each_runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows with every attempt at a batched pass: whether there was one."""
    found: list[bool] = []
    in_steps = LoweredPrologue.in_steps

    def watched(self: LoweredPrologue, *args: Any) -> Any:
        result = in_steps(self, *args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(LoweredPrologue, "in_steps", watched)
    return found


CALLS = [call_of(step) for step in range(STEPS)]


def test_the_second_run_is_batched(model: Conditioned, monkeypatch: pytest.MonkeyPatch) -> None:
    batched = each_runs(monkeypatch)
    compiled = compiled_for(model)
    for _ in range(3):
        check_run(compiled, CALLS)
    assert batched == [True, True]  # the first run tells the timesteps


def test_other_timesteps_than_foreseen(model: Conditioned) -> None:
    compiled = compiled_for(model)
    check_run(compiled, CALLS)
    others = [{**call, "timestep": call["timestep"] * 0.99} for call in CALLS]
    check_run(compiled, others)  # from the first step on
    check_run(compiled, others)
    check_run(compiled, [*others[:2], *CALLS[2:]])  # in mid-run


def test_weights_are_those_of_the_run(model: Conditioned) -> None:
    compiled = compiled_for(model)
    check_run(compiled, CALLS)
    check_run(compiled, CALLS)
    with torch.no_grad():
        model.position.add_(1.0)
        model.mixed.weight.mul_(2.0)
    check_run(compiled, CALLS)
    model.keys.weight = nn.Parameter(torch.randn_like(model.keys.weight))
    check_run(compiled, CALLS)


def test_another_prompt_in_another_run_and_in_mid_run(model: Conditioned) -> None:
    compiled = compiled_for(model)
    check_run(compiled, CALLS)
    others = [{**call, "prompt_embeds": -call["prompt_embeds"]} for call in CALLS]
    check_run(compiled, others)
    check_run(compiled, [*CALLS[:2], *others[2:]])
    assert compiled.stats is not None
    assert compiled.stats.catch_ups == [2]  # that step may not reuse what another prompt left


def test_one_of_two_streams_changes_its_request(model: Conditioned) -> None:
    """With as many streams as are kept, one is given over to another request and must not keep its values."""
    compiled = compiled_for(model)
    prompts = [CALLS[0]["prompt_embeds"] + shift for shift in range(6)]
    check_run(compiled, [{**call, "prompt_embeds": prompts[step]} for step, call in enumerate(CALLS)])
    check_run(compiled, [{**call, "prompt_embeds": prompts[step + 2]} for step, call in enumerate(CALLS)])


def test_what_cannot_be_batched_is_computed_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Conditioned().eval()
    compiled = compiled_for(model)
    batched = each_runs(monkeypatch)

    def no_rule(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("an operator without a batching rule")

    monkeypatch.setattr(torch, "vmap", no_rule)
    for _ in range(3):
        check_run(compiled, CALLS)
    assert batched == [False, False]


def test_where_nobody_waits_an_overwritten_input_is_raised_at_the_end(
    model: Conditioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "_is_read_at_once", lambda tensor: False)
    compiled = compiled_for(model)
    with torch.inference_mode():
        prompt = CALLS[0]["prompt_embeds"].clone()
        calls = [{**call, "prompt_embeds": prompt} for call in CALLS]
        check_run(compiled, calls)
        compiled.reset()
        for call in calls[:-1]:
            compiled(**call)
        prompt.neg_()
        with pytest.raises(RunError, match="prompt_embeds was overwritten in mid-run"):
            compiled(**calls[-1])
        check_run(compiled, calls)


def test_in_inference_mode(model: Conditioned) -> None:
    compiled = compiled_for(model)
    for _ in range(2):
        with torch.inference_mode():
            check_run(compiled, CALLS)
        check_run(compiled, CALLS)
