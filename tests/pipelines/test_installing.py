"""What is put into a pipeline comes out of it again, whatever was exchanged in the meantime."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import HarmonicaError, RunError, ScheduleMismatchError
from tests.models import stack, stack_call
from tests.tiny import built, random_schedule, sample, saved_and_loaded, shallow, shallow_dit

STEPS = 4
CALL = {"class_labels": [1, 2]}


@pytest.fixture
def pipeline() -> Any:
    return built(shallow_dit)


@pytest.fixture
def schedule(pipeline: Any) -> Schedule:
    return random_schedule(pipeline.transformer, STEPS)


def test_a_denoiser_replaced_after_compiling_can_be_compiled(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    old, pipeline.transformer = pipeline.transformer, shallow_dit().transformer
    with pytest.raises(HarmonicaError, match="is not compiled"):
        hrt.get_compiled(pipeline)
    hrt.compile(pipeline, schedule, lowering="plain")
    got = sample(pipeline, STEPS, **CALL)
    hrt.reference(pipeline, schedule)
    assert np.array_equal(got, sample(pipeline, STEPS, **CALL))
    assert "_compiled_call_impl" not in old.__dict__


def test_uncompile_frees_the_scheduler_of_a_replaced_denoiser(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule)
    pipeline.transformer = shallow_dit().transformer
    hrt.uncompile(pipeline)
    assert type(pipeline.scheduler) is d.DDIMScheduler


def test_module_compile_takes_our_place_and_keeps_it(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule)
    pipeline.transformer.compile(backend="eager")
    theirs = pipeline.transformer._compiled_call_impl
    hrt.uncompile(pipeline)
    assert type(pipeline.scheduler) is d.DDIMScheduler
    assert pipeline.transformer._compiled_call_impl is theirs


def test_the_scheduler_of_a_collected_pipeline_is_free(schedule: Schedule) -> None:
    first = hrt.compile(shallow_dit(), schedule)
    scheduler, vae, gone = first.scheduler, first.vae, weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    other = d.DiTPipeline(shallow_dit().transformer, vae, scheduler)
    other.set_progress_bar_config(disable=True)
    hrt.compile(other, schedule)
    sample(other, STEPS, **CALL)
    assert hrt.get_compiled(other).report().last_calls == STEPS


def test_copies_of_the_parts_are_plain_and_leave_the_run_alone(pipeline: Any, schedule: Schedule) -> None:
    plain = sample(pipeline, STEPS, **CALL)
    hrt.compile(pipeline, schedule, lowering="plain")
    expected = sample(pipeline, STEPS, **CALL)
    transformer, scheduler = copy.deepcopy(pipeline.transformer), copy.deepcopy(pipeline.scheduler)
    assert "_compiled_call_impl" not in transformer.__dict__
    assert type(scheduler) is d.DDIMScheduler
    scheduler.set_timesteps(50)  # drives nothing
    other = d.DiTPipeline(transformer, pipeline.vae, scheduler)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(other, STEPS, **CALL), plain)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_a_pipeline_made_from_a_compiled_one_shares_its_denoiser() -> None:
    family = shallow("flux")
    pipeline = built(family.build)
    schedule = random_schedule(pipeline.transformer, STEPS)
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    expected = sample(pipeline, STEPS, **family.unguided)
    image_to_image = d.FluxImg2ImgPipeline(**pipeline.components)
    image_to_image.set_progress_bar_config(disable=True)
    call = {**family.unguided, "image": torch.rand(1, 3, 8, 8)}
    got = sample(image_to_image, STEPS, strength=0.5, **call)
    report = hrt.get_compiled(image_to_image).report()
    assert (report.last_first, report.last_calls) == (STEPS // 2, STEPS - STEPS // 2)
    assert np.array_equal(sample(pipeline, STEPS, **family.unguided), expected)
    hrt.reference(image_to_image, schedule)
    assert np.array_equal(sample(image_to_image, STEPS, strength=0.5, **call), got)


def test_a_loop_that_leaves_a_step_out_is_an_error(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule)
    scheduler, latents = pipeline.scheduler, torch.randn(1, 4, 4, 4)
    scheduler.set_timesteps(STEPS)
    first, _, third, _ = scheduler.timesteps

    def step(timestep: torch.Tensor) -> None:
        with torch.no_grad():
            noise = pipeline.transformer(latents, timestep[None], class_labels=torch.tensor([1])).sample
        scheduler.step(noise, timestep, latents)

    step(first)
    with pytest.raises(RunError, match="step 1 was stepped with timestep"):
        step(third)
    with pytest.raises(RunError, match="an earlier step of this run failed"):
        step(third)


def test_verify_leaves_what_was_compiled(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    compiled = hrt.get_compiled(pipeline)
    expected = sample(pipeline, STEPS, **CALL)
    hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **CALL)
    assert hrt.get_compiled(pipeline) is compiled
    with pytest.raises(ScheduleMismatchError):
        hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS + 1, **CALL)
    assert hrt.get_compiled(pipeline) is compiled
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_verify_leaves_a_plain_pipeline_plain(pipeline: Any, schedule: Schedule) -> None:
    hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **CALL)
    assert type(pipeline.scheduler) is d.DDIMScheduler
    assert "_compiled_call_impl" not in pipeline.transformer.__dict__


def test_a_saved_compiled_pipeline_compiles_to_the_same(tmp_path: Path) -> None:
    pipeline = saved_and_loaded(shallow_dit, tmp_path / "first")
    schedule = random_schedule(pipeline.transformer, STEPS)
    expected = sample(hrt.compile(pipeline, schedule), STEPS, **CALL)
    pipeline.save_pretrained(tmp_path / "second")
    loaded = d.DiTPipeline.from_pretrained(tmp_path / "second")
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(hrt.compile(loaded, schedule), STEPS, **CALL), expected)


def test_moving_a_compiled_pipeline_moves_its_denoiser(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, strict=True)
    sample(pipeline, STEPS, **CALL)
    pipeline.to(torch.float64)
    got = sample(pipeline, STEPS, **CALL)
    assert pipeline.transformer.dtype is torch.float64
    hrt.reference(pipeline, schedule)
    assert np.array_equal(got, sample(pipeline, STEPS, **CALL))


def test_a_copy_made_within_a_call_is_of_the_plain_model() -> None:
    """Hooks of a model run around a stand-in for its forward; a copy made then has neither it nor what it holds."""
    model = stack(depth=1)
    copies: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: copies.append(copy.deepcopy(module)) if not copies else None)
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=hrt.find_sites(model)))
    compiled(**stack_call(0))
    assert vars(copies[0])["forward"].__self__ is copies[0]
    assert torch.equal(copies[0](**stack_call(0)), model(**stack_call(0)))
