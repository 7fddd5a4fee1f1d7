"""Compiled equals reference, bit for bit, through the real pipelines of each family."""

from __future__ import annotations

from typing import Any

import diffusers as d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from tests.models import mixed_sites, random_weights
from tests.tiers import member
from tests.tiny import Family, built, families, random_schedule, sample, saved_and_loaded, shallow

FAMILIES = families()
SHALLOW = {**FAMILIES, "sd3": shallow("sd3"), "flux": shallow("flux")}
STEPS = 5
SIGMA = pytest.param("pixart-sigma", marks=pytest.mark.exhaustive)  # the transformer of PixArt-alpha


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: saved_and_loaded(family.build, tmp_path_factory.mktemp(name.replace("-", "_")))
        for name, family in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def shallow_pipelines() -> dict[str, Any]:
    return {name: built(family.build) for name, family in SHALLOW.items()}


def nfe(pipeline: Any, steps: int) -> int:
    """Model evaluations of a run, as the scheduler counts them."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=False)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def arguments(family: Family, guided: bool) -> dict[str, Any]:
    return family.guided if guided else family.unguided


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", ["dit", "pixart-alpha", SIGMA, "sd3", "flux"])
def test_compiled_equals_reference(pipelines: dict[str, Any], name: str, guided: bool) -> None:
    pipeline, call = pipelines[name], arguments(FAMILIES[name], guided)
    schedule = random_schedule(pipeline.transformer, STEPS, seed=3)
    plain = sample(pipeline, STEPS, **call)
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **call)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True, debug=True)
    got = sample(pipeline, STEPS, **call)
    report = hrt.get_compiled(pipeline).report()
    hrt.uncompile(pipeline)
    assert np.array_equal(got, expected)
    assert not np.array_equal(got, plain)  # something was reused
    assert report.last_cur == pytest.approx(schedule.cur)
    assert report.last_catch_ups == ()
    assert np.array_equal(sample(pipeline, STEPS, **call), plain)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("dit", d.DDIMScheduler),
        ("dit", d.PNDMScheduler),
        ("dit", d.SASolverScheduler),
        ("dit", d.DDPMScheduler),
        ("dit", d.HeunDiscreteScheduler),
        ("pixart-alpha", d.DPMSolverMultistepScheduler),
        pytest.param("pixart-sigma", d.DPMSolverMultistepScheduler, marks=pytest.mark.exhaustive),
        ("sd3", d.FlowMatchEulerDiscreteScheduler),
        ("sd3", d.FlowMatchHeunDiscreteScheduler),
        ("flux", d.FlowMatchEulerDiscreteScheduler),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.removesuffix("Scheduler"),
)
def test_every_step_of_every_sampler_is_equal(shallow_pipelines: dict[str, Any], name: str, scheduler: Any) -> None:
    pipeline, before = shallow_pipelines[name], shallow_pipelines[name].scheduler
    # the two solvers name their algorithms differently
    changes = {"algorithm_type": "data_prediction"} if scheduler is d.SASolverScheduler else {}
    pipeline.scheduler = scheduler.from_config(before.config, **changes)
    try:
        steps = nfe(pipeline, STEPS)
        schedule = random_schedule(pipeline.transformer, steps, seed=1)
        report = hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **FAMILIES[name].guided)
    finally:
        pipeline.scheduler = before
    calls_a_step = 2 if name == "flux" else 1
    assert [step.step for step in report.steps] == [s for s in range(steps) for _ in range(calls_a_step)]
    assert all(step.same_bits for step in report.steps)
    assert report.trajectory_same_bits


@pytest.mark.parametrize(
    "name", ["dit", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES if name != "dit")]
)
def test_a_schedule_that_computes_all_is_the_plain_pipeline(pipelines: dict[str, Any], name: str) -> None:
    pipeline, call = pipelines[name], FAMILIES[name].guided
    plain = sample(pipeline, 3, **call)
    schedule = Schedule.all_compute(steps=3, sites=find_sites(pipeline.transformer))
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = sample(pipeline, 3, **call)
    report = hrt.get_compiled(pipeline).report()
    hrt.uncompile(pipeline)
    assert np.array_equal(got, plain)
    assert not report.cached
    assert report.plans[0].theoretical_speedup == 1.0


@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), cur=st.sampled_from([0.2, 0.5, 0.7]))
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_any_random_schedule_is_equal(shallow_pipelines: dict[str, Any], name: str, seed: int, cur: float) -> None:
    pipeline = shallow_pipelines[name]
    schedule = Schedule.random(cur, steps=STEPS, sites=find_sites(pipeline.transformer), seed=seed)
    report = hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **FAMILIES[name].unguided)
    assert all(step.same_bits for step in report.steps)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", [member(name, id=name, always=name == "sd3") for name in FAMILIES])
def test_any_mix_of_sites_with_weights_is_equal(shallow_pipelines: dict[str, Any], name: str, seed: int) -> None:
    pipeline = shallow_pipelines[name]
    schedule = Schedule.random(0.5, steps=STEPS, sites=mixed_sites(pipeline.transformer, seed), seed=seed)
    schedule = random_weights(schedule, 3, seed=seed)
    report = hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **FAMILIES[name].guided)
    assert all(step.same_bits for step in report.steps)


@pytest.mark.parametrize("name", [member(name, id=name, always=name == "flux") for name in FAMILIES])
def test_a_forecast_of_the_output_is_equal(shallow_pipelines: dict[str, Any], name: str) -> None:
    pipeline = shallow_pipelines[name]
    schedule = Schedule.every(2, steps=STEPS, sites=[hrt.OUTPUT]).with_taylor(1)
    report = hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **FAMILIES[name].guided)
    assert all(step.same_bits for step in report.steps)


def test_each_family_has_the_expected_kinds_of_sites(pipelines: dict[str, Any]) -> None:
    kinds = {name: {site.rpartition(".")[2] for site in find_sites(p.transformer)} for name, p in pipelines.items()}
    assert kinds == {
        "dit": {"attn1", "ff"},
        "pixart-alpha": {"attn1", "attn2", "ff"},
        "pixart-sigma": {"attn1", "attn2", "ff"},
        "sd3": {"attn", "attn2", "ff", "ff_context"},
        "flux": {"attn", "ff", "ff_context", "proj_out"},
    }
    assert "single_transformer_blocks.0.attn" not in find_sites(pipelines["flux"].transformer)


def test_skip_layer_guidance_calls_a_third_time_in_some_steps(shallow_pipelines: dict[str, Any]) -> None:
    pipeline, steps = shallow_pipelines["sd3"], 6
    report = hrt.verify(
        pipeline,
        random_schedule(pipeline.transformer, steps, seed=2),
        lowering="plain",
        num_inference_steps=steps,
        skip_guidance_layers=[0],
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.7,
        **FAMILIES["sd3"].guided,
    )
    assert len(report.steps) > steps
    assert all(step.same_bits for step in report.steps)


def test_several_images_per_prompt_equal_the_reference(pipelines: dict[str, Any]) -> None:
    pipeline = pipelines["pixart-alpha"]
    schedule = random_schedule(pipeline.transformer, STEPS)
    call = {**FAMILIES["pixart-alpha"].guided, "num_images_per_prompt": 3}
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **call)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = sample(pipeline, STEPS, **call)
    hrt.uncompile(pipeline)
    assert got.shape[0] == 3
    assert np.array_equal(got, expected)


def test_callbacks_are_called_every_step(shallow_pipelines: dict[str, Any]) -> None:
    pipeline = shallow_pipelines["sd3"]
    schedule = random_schedule(pipeline.transformer, STEPS)
    seen: list[int] = []

    def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {}

    call = {**FAMILIES["sd3"].guided, "callback_on_step_end": count}
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, STEPS, **call)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = sample(pipeline, STEPS, **call)
    hrt.uncompile(pipeline)
    assert np.array_equal(got, expected)
    assert seen == [*range(STEPS), *range(STEPS)]


def test_a_callback_that_swaps_the_prompt_in_mid_run(shallow_pipelines: dict[str, Any]) -> None:
    pipeline = shallow_pipelines["sd3"]
    schedule = Schedule.every(3, steps=6, sites=find_sites(pipeline.transformer))

    def swap(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if step == 3 else {}

    call = {
        **FAMILIES["sd3"].guided,
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    hrt.reference(pipeline, schedule)
    expected = sample(pipeline, 6, **call)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = sample(pipeline, 6, **call)
    report = hrt.get_compiled(pipeline).report()
    hrt.uncompile(pipeline)
    assert np.array_equal(got, expected)
    assert report.last_catch_ups == (4,)  # step 5 reuses what step 4 stored


def test_a_run_after_an_interrupted_one_is_right(shallow_pipelines: dict[str, Any]) -> None:
    pipeline = shallow_pipelines["sd3"]
    schedule = random_schedule(pipeline.transformer, STEPS)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    whole = sample(pipeline, STEPS, **FAMILIES["sd3"].guided)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return {}

    cut = sample(pipeline, STEPS, callback_on_step_end=stop, **FAMILIES["sd3"].guided)
    again = sample(pipeline, STEPS, **FAMILIES["sd3"].guided)
    hrt.uncompile(pipeline)
    assert not np.array_equal(cut, whole)
    assert np.array_equal(again, whole)


@pytest.mark.parametrize("deep", [member(False, id="shallow", always=True), member(True, id="deep", always=False)])
@pytest.mark.parametrize("name", ["dit", "pixart-alpha", SIGMA, "sd3", "flux"])
def test_fused_is_within_the_tolerance(
    pipelines: dict[str, Any], shallow_pipelines: dict[str, Any], name: str, deep: bool
) -> None:
    pipeline = (pipelines if deep else shallow_pipelines)[name]
    schedule = random_schedule(pipeline.transformer, STEPS, seed=5)
    report = hrt.verify(pipeline, schedule, lowering="fused", num_inference_steps=STEPS, **FAMILIES[name].guided)
    assert report.tolerance == "measured"
    assert report.ok
