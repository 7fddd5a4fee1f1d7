"""Which step a call is in, where the scheduler's own steps do not tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import HarmonicaError, RunError
from harmonica_rt.indices import StepIndex
from harmonica_rt.pipelines.install import installed
from harmonica_rt.sampling.run_timesteps import RunTimesteps
from harmonica_rt.sampling.steps_by_timestep import StepsByTimestep
from tests.sampling.loops import PROMPT, STEPS, Conditioned, Oracle, Pipeline, conditioned, expected_run, first_latents
from tests.tiny import random_schedule

Denoise = Callable[[int, Any, torch.Tensor, torch.Tensor], torch.Tensor]  # step, stream, latents, timestep


@pytest.fixture
def model() -> Conditioned:
    return conditioned()


@pytest.fixture
def schedule(model: Conditioned) -> Schedule:
    return random_schedule(model, STEPS)


def own_integrator(scheduler: Any, denoise: Denoise) -> torch.Tensor:
    latents = first_latents()
    for step, timestep in enumerate(scheduler.timesteps):
        latents = latents - 0.1 * denoise(step, 0, latents, timestep)
    return latents


def own_integrator_with_guidance(scheduler: Any, denoise: Denoise) -> torch.Tensor:
    latents = first_latents()
    for step, timestep in enumerate(scheduler.timesteps):
        latents = latents - 0.1 * (denoise(step, 0, latents, timestep) + denoise(step, 1, latents, timestep))
    return latents


def copy_of_the_scheduler(scheduler: Any, denoise: Denoise) -> torch.Tensor:
    latents, own = first_latents(), copy.deepcopy(scheduler)
    for step, timestep in enumerate(scheduler.timesteps):
        latents = own.step(denoise(step, 0, latents, timestep), timestep, latents).prev_sample
    return latents


def state_of_each_view(scheduler: Any, denoise: Denoise) -> torch.Tensor:
    """As MultiDiffusion does it: the scheduler steps once per view, with the state that view left it in."""
    views, states = [first_latents(), -first_latents()], [copy.deepcopy(vars(scheduler)) for _ in range(2)]
    for step, timestep in enumerate(scheduler.timesteps):
        for view in range(2):
            vars(scheduler).update(states[view])
            noise = denoise(step, view, views[view], timestep)
            views[view] = scheduler.step(noise, timestep, views[view]).prev_sample
            states[view] = copy.deepcopy(vars(scheduler))
    return torch.cat(views)


def all_views_then_all_steps(scheduler: Any, denoise: Denoise) -> torch.Tensor:
    views = [first_latents(), -first_latents(), 2 * first_latents()]
    for step, timestep in enumerate(scheduler.timesteps):
        noises = [denoise(step, view, latents, timestep) for view, latents in enumerate(views)]
        views = [
            scheduler.step(noise, timestep, latents).prev_sample for noise, latents in zip(noises, views, strict=True)
        ]
    return torch.cat(views)


LOOPS = [
    own_integrator,
    own_integrator_with_guidance,
    copy_of_the_scheduler,
    state_of_each_view,
    all_views_then_all_steps,
]

# What pipelines make of the scheduler's timesteps.
SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda t: t,
    "in thousandths": lambda t: t / 1000,
    "reversed": lambda t: 1000 - t,
    "reversed in thousandths": lambda t: 1 - t / 1000,
}


class Loop:
    """A pipeline whose loop is one of the above."""

    def __init__(self, model: Conditioned, loop: Callable[..., torch.Tensor], scale: Callable[..., Any]) -> None:
        self.transformer = model
        self.scheduler = DDIMScheduler()
        self._loop, self._scale = loop, scale

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        self.scheduler.set_timesteps(STEPS)
        return self._loop(self.scheduler, lambda _step, _stream, *call: self.transformer(*self.arguments(*call)))

    def arguments(self, latents: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return latents, self._scale(timestep).float().expand(2), PROMPT

    def under(self, schedule: Schedule) -> torch.Tensor:
        """What it gives under the schedule, by the oracle, which is told the steps."""
        oracle, scheduler = Oracle(self.transformer, schedule), DDIMScheduler()
        scheduler.set_timesteps(STEPS)
        return self._loop(scheduler, lambda step, stream, *call: oracle(step, stream, *self.arguments(*call)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_steps_that_the_scheduler_does_not_tell_are_counted_by_timesteps(
    model: Conditioned, schedule: Schedule, loop: Callable[..., torch.Tensor], scale: str
) -> None:
    pipeline = Loop(model, loop, SCALES[scale])
    expected = pipeline.under(schedule)
    assert not torch.equal(expected, pipeline())
    hrt.reference(pipeline, schedule)
    for _ in range(2):
        assert torch.equal(pipeline(), expected)


@pytest.mark.parametrize("scale", [torch.sin, lambda t: 3 * t + 1], ids=["sine", "another line"])
def test_steps_that_nothing_tells_make_a_plain_run_and_are_said_once(
    model: Conditioned,
    schedule: Schedule,
    scale: Callable[[torch.Tensor], torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline = Loop(model, own_integrator, scale)
    plain = pipeline()
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    for _ in range(2):
        assert torch.equal(pipeline(), plain)
    (line,) = [line for line in caplog.messages if "cannot be counted" in line]
    assert "uncached" in line
    assert "ompile the pipeline" not in line


def test_more_calls_than_there_are_streams_are_computed_plainly(
    model: Conditioned, schedule: Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    def many_views(scheduler: Any, denoise: Denoise) -> torch.Tensor:
        views = [first_latents() + view for view in range(20)]
        for step, timestep in enumerate(scheduler.timesteps):
            noise = [denoise(step, view, latents, timestep) for view, latents in enumerate(views)]
            mean = sum(noise) / len(views)
            views = [scheduler.step(mean, timestep, latents).prev_sample for latents in views[:1]] * len(views)
        return views[0]

    pipeline = Loop(model, many_views, SCALES["as it is"])
    plain = pipeline()
    hrt.reference(pipeline, schedule)
    assert torch.equal(pipeline(), plain)
    assert sum("cannot be counted" in line for line in caplog.messages) == 1


# ---- `step` replaced on the object


def own_step(scheduler: Any) -> Callable[..., Any]:
    """One that never calls the original."""

    def step(noise: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        return DDIMScheduler.step(scheduler, noise, timestep, sample)

    return step


def wrapped_step(scheduler: Any) -> Callable[..., Any]:
    original = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return step


@pytest.mark.parametrize("when", ["before compiling", "after compiling"])
@pytest.mark.parametrize("replace", [own_step, wrapped_step], ids=lambda replace: replace.__name__)
def test_a_step_that_was_replaced_on_the_scheduler_counts_once(
    model: Conditioned, schedule: Schedule, replace: Callable[..., Any], when: str
) -> None:
    expected = expected_run(model, schedule)
    pipeline = Pipeline(model)
    scheduler = pipeline.scheduler
    if when == "before compiling":
        scheduler.step = replace(scheduler)
    hrt.reference(pipeline, schedule)
    if when == "after compiling":
        scheduler.step = replace(scheduler)
    assert torch.equal(pipeline(), expected)
    del scheduler.step
    assert torch.equal(pipeline(), expected)
    with pytest.raises(AttributeError):
        del scheduler.step
    hrt.uncompile(pipeline)
    assert type(scheduler) is DDIMScheduler
    assert "step" not in vars(scheduler)


class HandsOn:
    """A scheduler around another one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_a_wrapped_scheduler_is_counted(model: Conditioned, schedule: Schedule) -> None:
    expected = expected_run(model, schedule)
    pipeline = hrt.reference(Pipeline(model, HandsOn(DDIMScheduler())), schedule)
    for _ in range(2):
        assert torch.equal(pipeline(), expected)
    hrt.uncompile(pipeline)
    assert type(pipeline.scheduler) is HandsOn


def test_a_scheduler_that_cannot_be_watched_is_an_error(model: Conditioned, schedule: Schedule) -> None:
    class Fixed:
        __slots__ = ("inner",)

        def set_timesteps(self, steps: int) -> None: ...

        def step(self, noise: Any, timestep: Any, sample: Any) -> None: ...

    with pytest.raises(HarmonicaError, match="steps of a Fixed cannot be watched"):
        hrt.reference(Pipeline(model, Fixed()), schedule)


# ---- told by a timestep


def told(timesteps: torch.Tensor) -> StepsByTimestep:
    found = RunTimesteps.of(SimpleNamespace(timesteps=timesteps))
    assert found is not None
    return StepsByTimestep(found, 1000.0)


def positions(timesteps: torch.Tensor, given: list[torch.Tensor]) -> list[int | None]:
    """The steps that model timesteps are told to be in, all asked in step 0."""
    by_timestep = told(timesteps)
    return [by_timestep.step_of(each, StepIndex(0)) for each in given]


SPACED = torch.tensor([999.0, 750.5, 500.0, 120.25])


@pytest.mark.parametrize("scale", SCALES)
def test_each_scale_is_recognised(scale: str) -> None:
    for dtype in (torch.float64, torch.float32):
        given = SCALES[scale](SPACED.to(dtype))
        assert positions(SPACED, [t.expand(3) for t in given]) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [*SCALES, "root"])
def test_rounding_never_tells_another_step(scale: str, dtype: torch.dtype) -> None:
    """Neither where the steps are counted right, nor where the scale is none of the known ones."""
    make = SCALES.get(scale, lambda t: (t / 1000).sqrt())
    for steps in (4, 20, 50):
        for shift in (1.0, 3.0):
            sigmas = torch.linspace(1, 1 / steps, steps)
            timesteps = 1000 * shift * sigmas / (1 + (shift - 1) * sigmas)
            by_timestep = told(timesteps)
            for step, t in enumerate(timesteps):
                assert by_timestep.step_of(make(t.to(dtype)).expand(2), StepIndex(step)) in (step, None)


def test_in_doubt_nothing_is_told() -> None:
    assert positions(SPACED, [torch.tensor(3.0), SPACED[1]]) == [None, None]  # the first call fits no scale
    assert positions(SPACED, [SPACED[0], torch.tensor(3.0)]) == [0, None]
    assert positions(SPACED, [SPACED[0], SPACED[1:3]]) == [0, None]  # frames with timesteps of their own
    assert positions(torch.tensor([9.0, 5.0, 5.0]), [torch.tensor(9.0), torch.tensor(5.0)]) == [0, None]
    half = torch.tensor([500.0, 250.0])  # 1000 - 500 is 500, and 1000 - 250 no timestep
    assert positions(half, [half[0], half[1], torch.tensor(750.0)]) == [0, None, None]


def test_samplers_that_repeat_timesteps_are_counted_by_their_steps(model: Conditioned) -> None:
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    steps = len(scheduler.timesteps)
    schedule = random_schedule(model, steps)
    pipeline = hrt.reference(Pipeline(model, scheduler), schedule)
    pipeline()
    compiled = installed(model)
    assert compiled is not None
    stats = compiled.stats
    assert (stats.calls, stats.catch_ups) == (steps, [])
    assert stats.reused / stats.entries == pytest.approx(schedule.cur)


def test_two_calls_a_step_in_a_loop_of_ones_own_are_told_how_to_count(model: Conditioned, schedule: Schedule) -> None:
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    for call in range(STEPS):
        compiled(first_latents(), torch.full((2,), 1.0 - call // 2 / 10), PROMPT + call % 2)
    with pytest.raises(RunError, match=r"It took 6 calls, with 3 timesteps.*takes several calls \(guidance\)"):
        compiled(first_latents(), torch.full((2,), 0.7), PROMPT)
