"""Whose a call is: the run's, or somebody else's who has the same model."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import ConcurrentRunError
from tests.sampling.loops import (
    OTHER,
    PROMPT,
    STEPS,
    Conditioned,
    Pipeline,
    conditioned,
    expected_run,
    first_latents,
    model_time,
)
from tests.tiny import random_schedule


@pytest.fixture
def model() -> Conditioned:
    return conditioned()


@pytest.fixture
def schedule(model: Conditioned) -> Schedule:
    return random_schedule(model, STEPS)


@pytest.fixture
def expected(model: Conditioned, schedule: Schedule) -> torch.Tensor:
    return expected_run(model, schedule)


@pytest.fixture
def pipeline(expected: torch.Tensor, model: Conditioned, schedule: Schedule) -> Any:
    return hrt.compile(Pipeline(model), schedule, lowering="plain", strict=True)


class Stop(Exception):
    pass


def stopped(error: BaseException, at: int = 2) -> Callable[[Any, int], None]:
    def callback(pipe: Any, step: int) -> None:
        if step == at:
            raise error

    return callback


def in_a_callback(pipeline: Any) -> None:
    with pytest.raises(Stop):
        pipeline(stopped(Stop()))


def by_the_keyboard(pipeline: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline(stopped(KeyboardInterrupt()))


def in_the_model(pipeline: Any) -> None:
    calls = iter(range(STEPS))

    def fail(*_: Any) -> None:
        if next(calls) == 2:
            raise Stop

    hook = pipeline.transformer.register_forward_hook(fail)
    with pytest.raises(Stop):
        pipeline()
    hook.remove()


def before_the_first_call(pipeline: Any) -> None:
    def fail(*_: Any) -> None:
        raise Stop

    hook = pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        pipeline()
    hook.remove()


def generator_closed(pipeline: Any) -> None:
    run = pipeline.stepwise(PROMPT)
    next(run)
    run.close()


def generator_kept(pipeline: Any) -> None:
    pipeline.kept = pipeline.stepwise(PROMPT)
    next(pipeline.kept)


def function_of_ones_own(pipeline: Any) -> None:
    def loop() -> None:
        pipeline.scheduler.set_timesteps(STEPS)
        for timestep in pipeline.scheduler.timesteps[:2]:
            with torch.no_grad():
                noise = pipeline.transformer(first_latents(), model_time(timestep), PROMPT)
            pipeline.scheduler.step(noise, timestep, first_latents())

    loop()


INTERRUPTIONS = [
    in_a_callback,
    by_the_keyboard,
    in_the_model,
    before_the_first_call,
    generator_closed,
    generator_kept,
    function_of_ones_own,
]


def gradients(call: Callable[..., torch.Tensor], model: nn.Module) -> list[torch.Tensor]:
    """Output and gradients of a training step, which has latents and timesteps of its own."""
    model.zero_grad()
    latents = torch.full((2, 4, 8), 0.3, requires_grad=True)
    output = call(latents, torch.tensor([0.37, 0.81]), PROMPT)
    output.square().sum().backward()
    assert latents.grad is not None
    return [output.detach(), latents.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("interrupt", INTERRUPTIONS, ids=lambda interrupt: interrupt.__name__)
def test_after_an_interrupted_run_a_call_is_the_plain_models(
    pipeline: Any, model: Conditioned, expected: torch.Tensor, interrupt: Callable[[Any], None]
) -> None:
    plain = gradients(model.forward, model)
    interrupt(pipeline)
    for _ in range(2):
        got = gradients(pipeline.transformer, model)
        assert len(got) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert torch.equal(pipeline(), expected)


class Metric:
    """A validation metric in every shape that a callback has; calls the denoiser as the run does, and otherwise."""

    def __init__(self, model: nn.Module) -> None:
        self._plain = model.forward
        self.calls = 0

    def __call__(self, pipe: Any, step: int) -> None:
        self.calls += 1
        for time in (0.05, 0.5):
            for latents in (first_latents(), first_latents()[:, :2]):
                call = (latents, torch.full((2,), time), PROMPT)
                with torch.no_grad():
                    assert torch.equal(pipe.transformer(*call), self._plain(*call))

    def method(self, pipe: Any, step: int) -> None:
        self(pipe, step)


def plain_function(metric: Metric) -> dict[str, Any]:
    def callback(pipe: Any, step: int) -> None:
        metric(pipe, step)

    return {"callback": callback}


class AsModule(nn.Module):
    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self._metric = metric

    def forward(self, pipe: Any, step: int) -> None:
        self._metric(pipe, step)


class AsPartialMethod(AsModule):
    __call__ = functools.partialmethod(AsModule.forward)


KEPT: list[Any] = []


def weakly(metric: Metric) -> Any:
    KEPT[:] = [metric]
    return weakref.proxy(metric)


SHAPES: dict[str, Callable[[Metric], dict[str, Any]]] = {
    "function": plain_function,
    "method": lambda metric: {"callback": metric.method},
    "object": lambda metric: {"callback": metric},
    "partial": lambda metric: {"callback": functools.partial(Metric.method, metric)},
    "decorated": lambda metric: {"callback": torch.no_grad()(metric.method)},
    "module": lambda metric: {"callback": AsModule(metric)},
    "partial method": lambda metric: {"callback": AsPartialMethod(metric)},
    "bound partial method": lambda metric: {"callback": AsPartialMethod(metric).__call__},
    "weak proxy": lambda metric: {"callback": weakly(metric)},
    "weak method": lambda metric: {"callback": lambda *args: weakref.WeakMethod(metric.method)()(*args)},
    "by any name": lambda metric: {"on_step": metric.method},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_callback_that_calls_the_denoiser(
    pipeline: Any, model: Conditioned, expected: torch.Tensor, shape: str
) -> None:
    metric = Metric(model)
    for _ in range(2):
        assert torch.equal(pipeline(**SHAPES[shape](metric)), expected)
    assert metric.calls == 2 * STEPS
    report = hrt.get_compiled(pipeline).report()
    assert (report.last_calls, report.last_catch_ups) == (STEPS, ())


def test_a_pipeline_may_call_the_model_through_a_function_that_it_was_given(
    model: Conditioned, schedule: Schedule, expected: torch.Tensor
) -> None:
    class Given(Pipeline):
        def __call__(self, denoise: Callable[..., torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            latents = first_latents()
            self.scheduler.set_timesteps(STEPS)
            for timestep in self.scheduler.timesteps:
                noise = denoise(latents, model_time(timestep))
                latents = self.scheduler.step(noise, timestep, latents).prev_sample
            return latents

    pipeline = hrt.compile(Given(model), schedule, lowering="plain", strict=True)
    with torch.no_grad():
        assert torch.equal(pipeline(lambda *call: pipeline.transformer(*call, PROMPT)), expected)
    assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)


def test_timesteps_set_by_a_function_that_has_returned(
    model: Conditioned, schedule: Schedule, expected: torch.Tensor
) -> None:
    pipeline = hrt.compile(Pipeline(model), schedule, lowering="plain", strict=True)

    def begin() -> torch.Tensor:
        pipeline.scheduler.set_timesteps(STEPS)
        return first_latents()

    @torch.no_grad()
    def step(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        noise = pipeline.transformer(latents, model_time(timestep), PROMPT)
        after: torch.Tensor = pipeline.scheduler.step(noise, timestep, latents).prev_sample
        return after

    for _ in range(2):
        latents = begin()
        for timestep in pipeline.scheduler.timesteps:
            latents = step(latents, timestep)
        assert torch.equal(latents, expected)
        assert hrt.get_compiled(pipeline).report().last_cur == pytest.approx(schedule.cur)


def in_turns(first: Iterator[Any], second: Iterator[Any], ahead: int) -> None:
    for _ in range(ahead):
        next(first)
    for _ in range(STEPS):
        next(second)
        next(first)


class Streaming(Pipeline):
    """Its `__call__` is a generator."""

    def __call__(self, prompt: torch.Tensor = PROMPT) -> Iterator[torch.Tensor]:  # type: ignore[override]
        yield from self.stepwise(prompt)


@pytest.mark.parametrize("ahead", [1, STEPS - 1])
@pytest.mark.parametrize("prompt", [PROMPT, OTHER], ids=["same prompt", "other prompt"])
@pytest.mark.parametrize("shared", ["pipeline", "scheduler", "denoiser"])
@pytest.mark.parametrize("through", ["call", "method"])
def test_runs_that_take_turns_are_an_error_at_once(
    model: Conditioned, schedule: Schedule, shared: str, through: str, prompt: torch.Tensor, ahead: int
) -> None:
    wanted = expected_run(model, schedule, prompt)
    one = hrt.compile(Streaming(model), schedule, lowering="plain", strict=True)
    other = one if shared == "pipeline" else Streaming(model, one.scheduler if shared == "scheduler" else None)
    hrt.compile(other, schedule, lowering="plain", strict=True)
    first = one() if through == "call" else one.stepwise(PROMPT)
    second = other(prompt) if through == "call" else other.stepwise(prompt)
    for _ in range(ahead):
        next(first)
    next(second)
    with pytest.raises(ConcurrentRunError, match="two loops take turns"):
        next(first)
    *_, latents = second  # the run that was not disturbed is right
    assert torch.equal(latents, wanted)
    *_, latents = other(prompt)
    assert torch.equal(latents, wanted)


def test_taking_turns_is_told_by_the_schedulers_where_nothing_else_tells(
    model: Conditioned, schedule: Schedule
) -> None:
    pipelines = [Pipeline(model), Pipeline(model)]
    for pipeline in pipelines:
        hrt.compile(pipeline, schedule, lowering="plain", strict=True)

    def begin(pipeline: Pipeline) -> Iterator[torch.Tensor]:
        pipeline.scheduler.set_timesteps(STEPS)
        return iter(pipeline.scheduler.timesteps)

    @torch.no_grad()
    def step(pipeline: Pipeline, timestep: torch.Tensor) -> None:
        noise = pipeline.transformer(first_latents(), model_time(timestep), PROMPT)
        pipeline.scheduler.step(noise, timestep, first_latents())

    times = []
    for pipeline in pipelines:
        times.append(begin(pipeline))
        step(pipeline, next(times[-1]))
    with pytest.raises(ConcurrentRunError, match="two loops take turns"):
        step(pipelines[0], next(times[0]))
    with pytest.raises(hrt.HarmonicaError):
        step(pipelines[1], next(times[1]))


def test_runs_one_after_the_other_and_one_within_the_other(
    pipeline: Any, model: Conditioned, expected: torch.Tensor
) -> None:
    kept = pipeline.stepwise(PROMPT)
    next(kept)  # given up, and not closed
    for _ in range(2):
        *_, latents = pipeline.stepwise(PROMPT)
        assert torch.equal(latents, expected)
    inner: list[torch.Tensor] = []

    def preview(pipe: Any, step: int) -> None:
        if step == STEPS - 1:
            inner.append(pipe())

    assert torch.equal(pipeline(preview), expected)
    assert torch.equal(inner[0], expected)


def test_a_run_that_was_broken_off_keeps_nothing_of_the_callers_alive(pipeline: Any) -> None:
    class Large:
        pass

    gone: list[weakref.ref[Any]] = []

    def handler() -> None:
        large = Large()
        gone.append(weakref.ref(large))
        pipeline(stopped(Stop()))

    with pytest.raises(Stop) as caught:
        handler()
    del caught
    gc.collect()
    assert gone[0]() is None


def test_schedules_swapped_in_a_callback_hold_from_the_next_run_on(
    pipeline: Any, model: Conditioned, schedule: Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    other = random_schedule(model, STEPS, seed=7)

    def swap(pipe: Any, step: int) -> None:
        if step == 2:
            hrt.compile(pipe, other, lowering="plain", strict=True)

    pipeline(swap)
    (line,) = [line for line in caplog.messages if "in the middle of a run" in line]
    assert "applies from the next run on" in line
    assert not [line for line in caplog.messages if "outside a sampling run" in line]
    again = pipeline()
    hrt.uncompile(pipeline)
    assert torch.equal(again, expected_run(model, other))


def test_a_denoiser_replaced_after_compiling_is_said_once(
    pipeline: Any, model: Conditioned, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.transformer = conditioned()
    plain = Pipeline(conditioned(), DDIMScheduler())()
    for _ in range(2):
        assert torch.equal(pipeline(), plain)
    (line,) = [line for line in caplog.messages if "compile the pipeline again" in line]
    assert "DDIMScheduler took a step without a call of the compiled Conditioned" in line
