"""Callbacks that change a run in its midst, held against hooks written here, which share nothing with the package."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.lower import EXACT
from tests.tiny import Family, families, random_schedule, sample

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


@dataclass(frozen=True)
class Pair:
    """Two pipelines with the same weights: one plain, one compiled once for all tests."""

    plain: Any
    compiled: Any
    schedule: Schedule
    lowering: str

    def same(self, got: NDArray[Any], expected: NDArray[Any]) -> bool:
        """Equal bit for bit, or up to the rounding of a few steps where the lowering rounds otherwise."""
        if self.lowering in EXACT:
            return np.array_equal(got, expected)
        return got.shape == expected.shape and np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()

    def run(self, call: dict[str, Any]) -> tuple[Truth, NDArray[Any], NDArray[Any], Any]:
        """The truth and its images, the compiled pipeline's images and report."""
        truth = Truth(self.plain, self.schedule)
        with truth.running():
            expected = sample(self.plain, STEPS, **call)
        got = sample(self.compiled, STEPS, **call)
        return truth, expected, got, hrt.get_compiled(self.compiled).report()


def pair(family: Family, which: str, lowering: str) -> Pair:
    pipelines = []
    for _ in range(2):
        torch.manual_seed(0)
        pipelines.append(family.build())
        pipelines[-1].set_progress_bar_config(disable=True)
    plain, compiled = pipelines
    schedule = random_schedule(plain.transformer, STEPS, seed=4)
    if which == "every third":
        schedule = Schedule.every(3, steps=STEPS, sites=schedule.sites)
    return Pair(plain, hrt.compile(compiled, schedule, lowering=lowering, strict=True, debug=True), schedule, lowering)


@pytest.fixture(
    scope="module", params=[("every third", "plain"), ("random", "plain"), ("random", "fused")], ids=" ".join
)
def sd3(request: pytest.FixtureRequest) -> Pair:
    return pair(SD3, *request.param)


@pytest.fixture(scope="module", params=("plain", "fused"))
def flux(request: pytest.FixtureRequest) -> Pair:
    return pair(FLUX, "random", request.param)


def test_an_undisturbed_run(sd3: Pair) -> None:
    truth, expected, got, report = sd3.run(SD3.guided)
    assert sd3.same(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []


def test_two_calls_a_step(flux: Pair) -> None:
    truth, expected, got, report = flux.run(FLUX.guided)
    assert flux.same(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []
    assert report.last_calls == 2 * STEPS


@pytest.mark.parametrize("step", [0, 2, 3])
def test_guidance_cut_off_shrinks_the_batch(sd3: Pair, step: int) -> None:
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
    truth, expected, got, report = sd3.run(call)
    assert sd3.same(got, expected)
    assert list(report.last_catch_ups) == truth.computed_in_full


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "another tensor"])
def test_the_prompt_changes(sd3: Pair, in_place: bool) -> None:
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
    truth, expected, got, report = sd3.run(call)
    assert sd3.same(got, expected)
    assert list(report.last_catch_ups) == truth.computed_in_full == [4]


@pytest.mark.parametrize("change", [{"height": 16}, {"num_images_per_prompt": 2}, {}], ids=["size", "images", "same"])
def test_a_new_size_and_a_new_number_of_images(flux: Pair, change: dict[str, int]) -> None:
    truth, expected, got, report = flux.run({**FLUX.unguided, **change})
    assert flux.same(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []


def test_a_callback_that_raises_leaves_the_next_run_right(sd3: Pair) -> None:
    def stop(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now == 2:
            raise KeyError("stop")
        return {}

    with pytest.raises(KeyError):
        sample(sd3.compiled, STEPS, callback_on_step_end=stop, **SD3.guided)
    _, expected, got, _ = sd3.run(SD3.guided)
    assert sd3.same(got, expected)
