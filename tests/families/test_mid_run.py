"""Callbacks that change a run in its midst, held against hooks written here, which share nothing with the package."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.tiny import families, random_schedule, sample

STEPS = 6
SD3, FLUX = families()["sd3"], families()["flux"]


class Truth:
    """Runs a plain pipeline under a schedule with forward hooks.

    Features belong to the prompt a call is for. A call reuses nothing unless everything it would reuse is there, as
    new as the schedule says.
    """

    def __init__(self, pipeline: Any, schedule: Schedule) -> None:
        self._pipeline = pipeline
        self._schedule = schedule
        self._step = 0
        self._features: dict[Any, dict[str, tuple[int, Any]]] = {}
        self._held: dict[str, tuple[int, Any]] = {}
        self._reused: set[str] = set()
        self.computed_in_full: list[int] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        model, scheduler = self._pipeline.transformer, self._pipeline.scheduler
        original = scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._step += 1
            return original(*args, **kwargs)

        scheduler.step = step
        hooks = [model.register_forward_pre_hook(self._call_begins, with_kwargs=True)]
        for site in self._schedule.sites:
            hook = functools.partial(self._site_ran, site)
            hooks.append(model.get_submodule(site).register_forward_hook(hook))
        try:
            yield
        finally:
            del scheduler.step
            for handle in hooks:
                handle.remove()

    def _call_begins(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        prompt = kwargs["encoder_hidden_states"]
        self._held = self._features.setdefault((tuple(prompt.shape), float(prompt.double().sum())), {})
        rows = self._schedule.compute[: self._step + 1]
        sources = {
            site: int(np.flatnonzero(rows[:, column])[-1])
            for column, site in enumerate(self._schedule.sites)
            if not rows[-1, column]
        }
        fresh = all(site in self._held and self._held[site][0] >= source for site, source in sources.items())
        self._reused = set(sources) if fresh else set()
        if not fresh:
            self.computed_in_full.append(self._step)

    def _site_ran(self, site: str, module: Any, args: Any, output: Any) -> Any:
        if site in self._reused:
            return self._held[site][1]
        kept = tuple(o.clone() for o in output) if isinstance(output, tuple) else output.clone()
        self._held[site] = (self._step, kept)
        return None


def truth_and_compiled(pipeline: Any, schedule: Schedule, call: dict[str, Any]) -> tuple[Truth, NDArray[Any], Any, Any]:
    truth = Truth(pipeline, schedule)
    with truth.running():
        expected = sample(pipeline, schedule.steps, **call)
    hrt.compile(pipeline, schedule, strict=True, debug=True)
    try:
        got = sample(pipeline, schedule.steps, **call)
        report = hrt.get_compiled(pipeline).report()
    finally:
        hrt.uncompile(pipeline)
    return truth, expected, got, report


@pytest.fixture(scope="module")
def sd3() -> Any:
    torch.manual_seed(0)
    pipeline = SD3.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def flux() -> Any:
    torch.manual_seed(0)
    pipeline = FLUX.build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def schedules(pipeline: Any) -> list[Schedule]:
    sites = hrt.find_sites(pipeline.transformer)
    return [Schedule.every(3, steps=STEPS, sites=sites), random_schedule(pipeline.transformer, STEPS, seed=4)]


@pytest.mark.parametrize("which", [0, 1], ids=["every third", "random"])
def test_an_undisturbed_run(sd3: Any, which: int) -> None:
    truth, expected, got, report = truth_and_compiled(sd3, schedules(sd3)[which], SD3.guided)
    assert np.array_equal(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []


@pytest.mark.parametrize("which", [0, 1], ids=["every third", "random"])
def test_two_calls_a_step(flux: Any, which: int) -> None:
    truth, expected, got, report = truth_and_compiled(flux, schedules(flux)[which], FLUX.guided)
    assert np.array_equal(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []
    assert report.last_calls == 2 * STEPS


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("which", [0, 1], ids=["every third", "random"])
def test_guidance_cut_off_shrinks_the_batch(sd3: Any, which: int, step: int) -> None:
    def cut(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now != step:
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensor.chunk(2)[1] for name, tensor in tensors.items()}

    call = {
        **SD3.guided,
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }
    truth, expected, got, report = truth_and_compiled(sd3, schedules(sd3)[which], call)
    assert np.array_equal(got, expected)
    assert list(report.last_catch_ups) == truth.computed_in_full
    assert len(report.plans) == 2


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "another tensor"])
@pytest.mark.parametrize("which", [0, 1], ids=["every third", "random"])
def test_the_prompt_changes(sd3: Any, which: int, in_place: bool) -> None:
    def change(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now != 3:
            return {}
        prompt = tensors["prompt_embeds"]
        return {"prompt_embeds": prompt.mul_(0.5) if in_place else prompt * 0.5}

    call = {
        **SD3.guided,
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    truth, expected, got, report = truth_and_compiled(sd3, schedules(sd3)[which], call)
    assert np.array_equal(got, expected)
    assert list(report.last_catch_ups) == truth.computed_in_full


def test_a_new_size_and_a_new_number_of_images(flux: Any) -> None:
    schedule = schedules(flux)[1]
    for change in ({"height": 16}, {"num_images_per_prompt": 2}, {}):
        _, expected, got, report = truth_and_compiled(flux, schedule, {**FLUX.unguided, **change})
        assert np.array_equal(got, expected)
        assert report.last_catch_ups == ()


def test_a_callback_that_raises_leaves_the_next_run_right(sd3: Any) -> None:
    schedule = schedules(sd3)[1]

    def stop(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now == 2:
            raise KeyError("stop")
        return {}

    hrt.compile(sd3, schedule, strict=True)
    with pytest.raises(KeyError):
        sample(sd3, STEPS, callback_on_step_end=stop, **SD3.guided)
    got = sample(sd3, STEPS, **SD3.guided)
    hrt.uncompile(sd3)
    truth = Truth(sd3, schedule)
    with truth.running():
        assert np.array_equal(got, sample(sd3, STEPS, **SD3.guided))
