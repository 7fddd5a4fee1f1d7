"""Callbacks that change a run in its midst, held against an independent truth."""

from __future__ import annotations

from typing import Any

import pytest

from harmonica_rt import Schedule, find_sites
from tests.tiny import random_schedule, sample, shallow
from tests.truth import Pair, pair

STEPS = 6
SD3, FLUX = shallow("sd3"), shallow("flux")


def schedule_of(which: str, model: Any) -> Schedule:
    if which == "every third":
        return Schedule.every(3, steps=STEPS, sites=find_sites(model))
    return random_schedule(model, STEPS, seed=4)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("every third", "plain"), id="every third plain"),
        pytest.param(("random", "plain"), id="random plain", marks=pytest.mark.exhaustive),
        pytest.param(("random", "fused"), id="random fused"),
    ],
)
def sd3(request: pytest.FixtureRequest) -> Pair:
    which, lowering = request.param
    return pair(SD3.build, lambda model: schedule_of(which, model), lowering)


@pytest.fixture(scope="module", params=("plain", "fused"))
def flux(request: pytest.FixtureRequest) -> Pair:
    return pair(FLUX.build, lambda model: schedule_of("random", model), request.param)


def test_an_undisturbed_run_equals_the_truth(sd3: Pair) -> None:
    truth, expected, got, report = sd3.run(SD3.guided)
    assert sd3.same(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []


def test_two_calls_per_step_equal_the_truth(flux: Pair) -> None:
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
def test_a_prompt_changed_in_mid_run_causes_one_catch_up(sd3: Pair, in_place: bool) -> None:
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
def test_the_size_and_the_number_of_images_may_change(flux: Pair, change: dict[str, int]) -> None:
    truth, expected, got, report = flux.run({**FLUX.unguided, **change})
    assert flux.same(got, expected)
    assert truth.computed_in_full == list(report.last_catch_ups) == []


@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupted_run_leaves_the_next_one_right(sd3: Pair, step: int) -> None:
    def stop(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = now >= step
        return {}

    _, shorter, cut, report = sd3.run({**SD3.guided, "callback_on_step_end": stop})
    assert sd3.same(cut, shorter)
    assert report.last_calls == step + 1
    truth, expected, got, report = sd3.run(SD3.guided)
    assert sd3.same(got, expected)
    assert not sd3.same(got, cut)
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
