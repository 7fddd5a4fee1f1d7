"""Hoisted values in runs: foreseen timesteps, other timesteps, other weights, other requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.call.call import CallConvention
from harmonica_rt.engine import RunKey
from harmonica_rt.errors import RunError
from harmonica_rt.execute.forecast import Forecast, ForecastKey
from harmonica_rt.execute.lowered_prologue import LoweredPrologue
from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.execute.stream_prologue import StreamPrologue
from harmonica_rt.indices import StepIndex
from harmonica_rt.sampling import conditioning
from tests.lower.test_hoist import SITES, STEPS, Conditioned, call_of


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
    monkeypatch.setattr(conditioning, "_is_compared_at_once", lambda tensor: False)
    compiled = compiled_for(model)
    with torch.inference_mode():
        prompt = CALLS[0]["prompt_embeds"].clone()
        calls = [{**call, "prompt_embeds": prompt} for call in CALLS]
        check_run(compiled, calls)
        compiled.reset()
        for call in calls[:-1]:
            compiled(**call)
        prompt.neg_()
        with pytest.raises(RunError, match="prompt_embeds was overwritten mid-run"):
            compiled(**calls[-1])
        check_run(compiled, calls)


def test_in_inference_mode(model: Conditioned) -> None:
    compiled = compiled_for(model)
    for _ in range(2):
        with torch.inference_mode():
            check_run(compiled, CALLS)
        check_run(compiled, CALLS)


def foreseen(model: Conditioned) -> PlanRuntime:
    """A plan that has seen a run of `CALLS`."""
    compiled = compiled_for(model)
    check_run(compiled, CALLS)
    (runtime,) = compiled.plans.values()
    known = runtime.forecasts.get(ForecastKey(None, 0))
    assert known is not None
    runtime.forecasts.learn(KEY, known)
    return runtime


KEY = ForecastKey(RunKey((3.0, 2.0, 1.0, 0.0)), 0)
LATE = ForecastKey(RunKey((3.0, 2.0, 1.0, 0.0), StepIndex(2)), 0)


def hoisted_at(step: int, given: dict[str, torch.Tensor], runtime: PlanRuntime, key: ForecastKey = KEY) -> Any:
    """Hoisted values of a stream whose first call this is, where nobody compares."""
    assert runtime.lowered.prologue is not None
    forecast = Forecast(runtime.forecasts, key, comparable=False)
    stream = StreamPrologue(runtime.lowered.prologue, runtime.parameters.of, forecast)
    model = Conditioned()
    return stream, stream.at(StepIndex(step), CallConvention(model).normalise((), given))


def test_a_stream_that_does_not_begin_with_the_run_is_not_foreseen(model: Conditioned) -> None:
    runtime = foreseen(model)
    late = {**CALLS[2], "timestep": CALLS[2]["timestep"] + 7.0}
    _, at_first = hoisted_at(0, {**CALLS[0], "timestep": CALLS[0]["timestep"] + 7.0}, runtime)
    _, as_foreseen = hoisted_at(0, CALLS[0], runtime)
    assert all(torch.equal(at_first[name], as_foreseen[name]) for name in as_foreseen)  # trusted: raised at the end
    _, own = hoisted_at(2, late, runtime)
    _, usual = hoisted_at(2, CALLS[2], runtime)
    assert any(not torch.equal(own[name], usual[name]) for name in usual)


def test_a_run_that_leaves_out_its_first_steps_is_foreseen_by_others_that_do(model: Conditioned) -> None:
    runtime = foreseen(model)
    stream, own = hoisted_at(2, CALLS[2], runtime, LATE)
    stream.at(StepIndex(3), CallConvention(Conditioned()).normalise((), CALLS[3]))
    assert runtime.forecasts.get(LATE) is None
    stream.end()
    assert runtime.forecasts.get(LATE) is not None
    wrong = {**CALLS[2], "timestep": CALLS[2]["timestep"] + 7.0}
    stream, as_foreseen = hoisted_at(2, wrong, runtime, LATE)
    for name in own:
        torch.testing.assert_close(own[name], as_foreseen[name])
    with pytest.raises(RunError, match="the next run will be right"):
        stream.end()
    assert runtime.forecasts.get(KEY) is not None


def test_a_forecast_that_was_wrong_is_forgotten(model: Conditioned) -> None:
    runtime = foreseen(model)
    stream, _ = hoisted_at(0, {**CALLS[0], "timestep": CALLS[0]["timestep"] + 7.0}, runtime)
    with pytest.raises(RunError, match="the next run will be right"):
        stream.end()
    assert runtime.forecasts.get(KEY) is None
    assert runtime.forecasts.get(ForecastKey(None, 0)) is not None  # another one


def test_in_inference_mode_a_buffer_that_is_written_in_every_step(
    model: Conditioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioning, "_is_compared_at_once", lambda tensor: False)
    compiled = compiled_for(model)
    truth = hrt.reference(model, compiled.schedule)
    with torch.inference_mode():
        timestep = CALLS[0]["timestep"].clone()
        for _ in range(2):
            compiled.reset(), truth.reset()
            for call in CALLS:
                timestep.copy_(call["timestep"])
                torch.testing.assert_close(compiled(**{**call, "timestep": timestep}), truth(**call))
