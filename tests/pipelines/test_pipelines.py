"""A compiled pipeline goes on working as before."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import ConcurrentRunError, HarmonicaError, RunError, ScheduleMismatchError
from tests.tiny import flux as flux_pipeline
from tests.tiny import random_schedule, sample, saved_and_loaded, shallow_dit

STEPS = 5
CALL = {"class_labels": [1, 2], "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit")
    saved_and_loaded(shallow_dit, path)
    return path


@pytest.fixture
def pipeline(directory: Path) -> Any:
    loaded = d.DiTPipeline.from_pretrained(directory)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def schedule(pipeline: Any) -> Schedule:
    return random_schedule(pipeline.transformer, STEPS)


@pytest.fixture
def plain(pipeline: Any) -> NDArray[Any]:
    return sample(pipeline, STEPS, **CALL)


@pytest.fixture
def expected(pipeline: Any, schedule: Schedule) -> NDArray[Any]:
    hrt.reference(pipeline, schedule)
    images = sample(pipeline, STEPS, **CALL)
    hrt.uncompile(pipeline)
    return images


def test_the_denoiser_stays_what_it_was(pipeline: Any, schedule: Schedule) -> None:
    before, scheduler = pipeline.transformer, pipeline.scheduler
    config, parameters = dict(before.config), list(before.parameters())
    assert hrt.compile(pipeline, schedule, lowering="plain") is pipeline
    assert pipeline.transformer is before
    assert type(pipeline.transformer) is d.DiTTransformer2DModel
    assert dict(pipeline.transformer.config) == config
    assert pipeline.transformer.dtype is torch.float32
    assert pipeline.transformer.device.type == "cpu"
    assert all(a is b for a, b in zip(pipeline.transformer.parameters(), parameters, strict=True))
    assert pipeline.scheduler is scheduler
    assert isinstance(scheduler, d.DDIMScheduler)
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert (
        list(inspect.signature(scheduler.step).parameters)
        == list(inspect.signature(d.DDIMScheduler.step).parameters)[1:]
    )


def test_uncompile_gives_the_original_back(pipeline: Any, schedule: Schedule, plain: NDArray[Any]) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    assert not np.array_equal(sample(pipeline, STEPS, **CALL), plain)
    assert hrt.uncompile(pipeline) is pipeline
    assert type(pipeline.scheduler) is d.DDIMScheduler
    assert "_compiled_call_impl" not in pipeline.transformer.__dict__
    assert np.array_equal(sample(pipeline, STEPS, **CALL), plain)
    hrt.uncompile(pipeline)  # once more changes nothing
    with pytest.raises(HarmonicaError, match="DiTPipeline is not compiled"):
        hrt.get_compiled(pipeline)


def test_saved_and_copied_pipelines_are_plain(
    pipeline: Any, schedule: Schedule, plain: NDArray[Any], expected: NDArray[Any], tmp_path: Path
) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    sample(pipeline, STEPS, **CALL)
    pipeline.save_pretrained(tmp_path)
    loaded = d.DiTPipeline.from_pretrained(tmp_path)
    copied = copy.deepcopy(pipeline)
    for other in (loaded, copied):
        other.set_progress_bar_config(disable=True)
        assert type(other.scheduler) is d.DDIMScheduler
        assert np.array_equal(sample(other, STEPS, **CALL), plain)
    for scheduler in (copy.copy(pipeline.scheduler), pickle.loads(pickle.dumps(pipeline.scheduler))):
        assert type(scheduler) is d.DDIMScheduler
        assert scheduler.config == pipeline.scheduler.config
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_progress_bar_and_output_types(pipeline: Any, schedule: Schedule, capfd: pytest.CaptureFixture[str]) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    pipeline.set_progress_bar_config(disable=False)
    result = pipeline([1], num_inference_steps=STEPS, output_type="pil", return_dict=False)
    assert result[0][0].size == (4, 4)
    assert f"{STEPS}/{STEPS}" in capfd.readouterr().err


def test_another_number_of_steps_is_an_error_and_the_next_run_is_right(
    pipeline: Any, schedule: Schedule, expected: NDArray[Any]
) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    with pytest.raises(ScheduleMismatchError, match="for 5 steps, but the pipeline asked for 7"):
        sample(pipeline, 7, **CALL)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_a_run_that_breaks_off_leaves_the_next_one_right(
    pipeline: Any, schedule: Schedule, expected: NDArray[Any]
) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hook = pipeline.transformer.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sample(pipeline, STEPS, **CALL)
    hook.remove()
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_a_scheduler_replaced_after_compiling_is_followed(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    old = pipeline.scheduler
    sample(pipeline, STEPS, **CALL)
    pipeline.scheduler = d.DDIMScheduler.from_config(old.config, timestep_spacing="trailing")
    got = sample(pipeline, STEPS, **CALL)
    report = hrt.get_compiled(pipeline).report()
    hrt.reference(pipeline, schedule)
    assert np.array_equal(got, sample(pipeline, STEPS, **CALL))
    assert (report.last_calls, report.last_catch_ups) == (STEPS, ())
    assert type(old) is d.DDIMScheduler  # left alone again


def test_a_scheduler_made_from_the_compiled_one_is_followed(
    pipeline: Any, schedule: Schedule, expected: NDArray[Any]
) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    assert hrt.get_compiled(pipeline).report().last_calls == STEPS
    hrt.uncompile(pipeline)
    assert type(pipeline.scheduler) is d.DDIMScheduler


def test_processors_may_change_after_the_timesteps_were_set(pipeline: Any, schedule: Schedule) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    sample(pipeline, STEPS, **CALL)
    call = {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    pipeline.scheduler.set_timesteps(STEPS)
    pipeline.transformer.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with torch.no_grad():
        got = pipeline.transformer(**call).sample
        hrt.uncompile(pipeline)
        assert torch.equal(got, pipeline.transformer(**call).sample)


def test_a_generator_of_ones_own_is_rewound(pipeline: Any, schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(3)
    report = hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, generator=generator, **CALL)
    assert report.trajectory_same_bits


def test_runs_that_begin_late_are_an_error(pipeline: Any, schedule: Schedule, expected: NDArray[Any]) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    scheduler, latents = pipeline.scheduler, torch.randn(1, 4, 4, 4)
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[2]
    with torch.no_grad():
        noise = pipeline.transformer(latents, timestep[None], class_labels=torch.tensor([1])).sample
    with pytest.raises(RunError, match=r"belongs to another step.*image-to-image"):
        scheduler.step(noise, timestep, latents)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_calls_outside_a_run_are_plain_and_logged(
    pipeline: Any, schedule: Schedule, caplog: pytest.LogCaptureFixture
) -> None:
    call = {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    with torch.no_grad():
        before = pipeline.transformer(**call).sample
        hrt.compile(pipeline, schedule, lowering="plain")
        assert torch.equal(pipeline.transformer(**call).sample, before)
    assert any("outside a sampling run" in line for line in caplog.messages)


def test_two_threads_at_once_never_give_a_wrong_image(
    pipeline: Any, schedule: Schedule, expected: NDArray[Any]
) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    sample(pipeline, STEPS, **CALL)
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(sample(pipeline, STEPS, **CALL))
        except RunError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(isinstance(result, RunError) or np.array_equal(result, expected) for result in results)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    one_after_the_other = threading.Thread(target=work)
    one_after_the_other.start()
    one_after_the_other.join()
    assert np.array_equal(results[-1], expected)


def test_a_run_taken_over_by_another_thread_is_an_error(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    call = (torch.randn(1, 4, 4, 4), torch.tensor([999]), torch.tensor([1]))
    pipeline.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        pipeline.transformer(*call[:2], class_labels=call[2])
        other = threading.Thread(target=pipeline.scheduler.set_timesteps, args=(STEPS,))
        other.start()
        other.join()
        with pytest.raises(ConcurrentRunError, match="another thread began a sampling run"):
            pipeline.transformer(*call[:2], class_labels=call[2])


def test_two_pipelines_may_not_share_a_compiled_scheduler(pipeline: Any, schedule: Schedule, directory: Path) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    other = d.DiTPipeline.from_pretrained(directory, scheduler=pipeline.scheduler)
    with pytest.raises(HarmonicaError, match="already drives another compiled model"):
        hrt.compile(other, schedule, lowering="plain")


def test_compiling_again_replaces_the_schedule(pipeline: Any, schedule: Schedule, plain: NDArray[Any]) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")
    hrt.compile(pipeline, Schedule.all_compute(steps=STEPS, sites=schedule.sites), lowering="plain")
    assert np.array_equal(sample(pipeline, STEPS, **CALL), plain)


def test_new_shapes_get_plans_of_their_own(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    got = [sample(pipeline, STEPS, class_labels=labels) for labels in ([1], [1, 2, 3], [1])]
    report = hrt.get_compiled(pipeline).report()
    hrt.reference(pipeline, schedule)
    for labels, images in zip(([1], [1, 2, 3], [1]), got, strict=True):
        assert np.array_equal(images, sample(pipeline, STEPS, class_labels=labels))
    assert len(report.plans) == 2


@pytest.fixture
def flux() -> Any:
    return flux_pipeline().transformer


FLUX_CALL = {
    "hidden_states": torch.zeros(1, 4, 4),
    "encoder_hidden_states": torch.zeros(1, 2, 12),
    "pooled_projections": torch.zeros(1, 10),
    "timestep": torch.tensor([1.0]),
    "guidance": torch.tensor([3.5]),
    "img_ids": torch.zeros(4, 3),
    "txt_ids": torch.zeros(2, 3),
}


def test_the_cache_context_of_diffusers_still_works(flux: Any) -> None:
    compiled = hrt.compile(flux, random_schedule(flux, 2), lowering="plain", strict=True)
    with compiled.cache_context("cond"):
        got = compiled(**FLUX_CALL).sample
    with torch.no_grad():
        assert torch.equal(got, flux(**FLUX_CALL).sample)


def test_a_cache_of_diffusers_on_the_same_model_is_refused(flux: Any) -> None:
    flux.enable_cache(d.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(hrt.CaptureError, match="carry hooks"):
        hrt.compile(flux, random_schedule(flux, 2), lowering="plain", strict=True)(**FLUX_CALL)


def test_attention_processors_may_change_after_compiling(pipeline: Any, schedule: Schedule) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    hrt.compile(pipeline, schedule, lowering="plain", strict=True)
    sample(pipeline, STEPS, **CALL)
    for block in pipeline.transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    got = sample(pipeline, STEPS, **CALL)
    hrt.reference(pipeline, schedule)
    assert np.array_equal(got, sample(pipeline, STEPS, **CALL))


def test_things_that_are_no_pipeline_are_refused(schedule: Schedule) -> None:
    class Empty:
        scheduler = d.DDIMScheduler()

        def __call__(self) -> None: ...

    with pytest.raises(HarmonicaError, match="Empty has no denoiser named transformer"):
        hrt.compile(Empty(), schedule)


def test_a_scheduler_without_set_timesteps_is_refused(pipeline: Any, schedule: Schedule) -> None:
    pipeline.register_modules(scheduler=None)
    pipeline.scheduler = object()
    with pytest.raises(HarmonicaError, match=r"object has no set_timesteps\(\)"):
        hrt.compile(pipeline, schedule, lowering="plain")
