"""Two threads on one compiled pipeline: an error in one of them, a right image in the other, never a wrong one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import ConcurrentRunError
from tests.tiny import random_schedule, sample, shallow

STEPS = 5
SD3 = shallow("sd3")


@pytest.fixture(scope="module")
def built() -> Any:
    torch.manual_seed(0)
    pipeline = SD3.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def schedule(built: Any) -> Schedule:
    return random_schedule(built.transformer, STEPS)


@pytest.fixture
def pipeline(built: Any, schedule: Schedule) -> Any:
    yield hrt.compile(built, schedule, lowering="plain", strict=True)
    hrt.uncompile(built)


def in_another_thread(work: Callable[[], Any]) -> list[Any]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results


def at_step(step: int, work: Callable[[], Any]) -> Callable[..., dict[str, Any]]:
    """A callback that does `work` after this step of the run of the thread that made it."""
    own = threading.get_ident()

    def callback(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now == step and threading.get_ident() == own:
            work()
        return {}

    return callback


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_whole_run_in_the_midst_of_another_is_right_and_ends_it(pipeline: Any, step: int) -> None:
    expected = sample(pipeline, STEPS, **SD3.unguided)
    inner: list[Any] = []

    def interfere() -> None:
        inner.extend(in_another_thread(lambda: sample(pipeline, STEPS, **SD3.unguided)))

    with pytest.raises(ConcurrentRunError, match="another thread began a sampling run"):
        sample(pipeline, STEPS, callback_on_step_end=at_step(step, interfere), **SD3.unguided)
    assert np.array_equal(inner[0], expected)
    assert np.array_equal(sample(pipeline, STEPS, **SD3.unguided), expected)


def test_after_the_last_step_nobody_is_disturbed(pipeline: Any) -> None:
    expected = sample(pipeline, STEPS, **SD3.unguided)
    inner: list[Any] = []

    def interfere() -> None:
        inner.extend(in_another_thread(lambda: sample(pipeline, STEPS, **SD3.unguided)))

    got = sample(pipeline, STEPS, callback_on_step_end=at_step(STEPS - 1, interfere), **SD3.unguided)
    assert np.array_equal(got, expected)
    assert np.array_equal(inner[0], expected)


def test_a_run_begun_between_call_and_step_fails_the_step(pipeline: Any) -> None:
    scheduler, latents = pipeline.scheduler, torch.randn(1, 16, 8, 8)
    scheduler.set_timesteps(STEPS)
    prompt = SD3.unguided
    with torch.no_grad():
        noise = pipeline.transformer(
            hidden_states=latents,
            timestep=scheduler.timesteps[:1],
            encoder_hidden_states=prompt["prompt_embeds"],
            pooled_projections=prompt["pooled_prompt_embeds"],
        ).sample
    in_another_thread(lambda: scheduler.set_timesteps(STEPS))
    with pytest.raises(ConcurrentRunError):
        scheduler.step(noise, scheduler.timesteps[0], latents)


def test_a_run_given_up_in_one_thread_hinders_no_run_in_any(pipeline: Any) -> None:
    expected = sample(pipeline, STEPS, **SD3.unguided)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return {}

    sample(pipeline, STEPS, callback_on_step_end=stop, **SD3.unguided)
    (elsewhere,) = in_another_thread(lambda: sample(pipeline, STEPS, **SD3.unguided))
    assert np.array_equal(elsewhere, expected)
    assert np.array_equal(sample(pipeline, STEPS, **SD3.unguided), expected)


def test_a_call_from_outside_after_a_run_was_given_up_and_another_thread_made_one(pipeline: Any) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return {}

    model = pipeline.transformer
    prompt = {"encoder_hidden_states": SD3.unguided["prompt_embeds"]}
    call = {"pooled_projections": SD3.unguided["pooled_prompt_embeds"], "timestep": torch.tensor([500.0]), **prompt}
    call["hidden_states"] = torch.randn(1, model.config.in_channels, 8, 8)
    plain = model.forward(**call).sample
    sample(pipeline, STEPS, callback_on_step_end=stop, **SD3.unguided)
    in_another_thread(lambda: sample(pipeline, STEPS, **SD3.unguided))
    assert torch.equal(model(**call).sample, plain)


def test_a_call_from_outside_after_a_displaced_run_was_told_so(pipeline: Any) -> None:
    model = pipeline.transformer
    prompt = {"encoder_hidden_states": SD3.unguided["prompt_embeds"]}
    call = {"pooled_projections": SD3.unguided["pooled_prompt_embeds"], "timestep": torch.tensor([500.0]), **prompt}
    call["hidden_states"] = torch.randn(1, model.config.in_channels, 8, 8)
    plain = model.forward(**call).sample
    work = at_step(1, lambda: in_another_thread(lambda: sample(pipeline, STEPS, **SD3.unguided)))
    with pytest.raises(ConcurrentRunError):
        sample(pipeline, STEPS, callback_on_step_end=work, **SD3.unguided)
    assert torch.equal(model(**call).sample, plain)


def test_runs_may_take_turns_in_many_threads(pipeline: Any) -> None:
    expected = sample(pipeline, STEPS, **SD3.unguided)
    for _ in range(3):
        (got,) = in_another_thread(lambda: sample(pipeline, STEPS, **SD3.unguided))
        assert np.array_equal(got, expected)
