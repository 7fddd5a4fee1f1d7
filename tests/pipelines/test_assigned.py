"""`pipe.transformer = hrt.compile(pipe.transformer, schedule)`, as people write it who know torch.compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import HarmonicaError, RunError
from tests.models import stack, stack_call
from tests.tiny import random_schedule, sample, shallow, shallow_dit

STEPS = 4
CALL = {"class_labels": [1, 2]}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made() -> Any:
    torch.manual_seed(0)
    return quiet(shallow_dit())


@pytest.fixture
def pipeline() -> Any:
    return made()


@pytest.fixture
def schedule(pipeline: Any) -> Schedule:
    return random_schedule(pipeline.transformer, STEPS)


def compiled_model(pipeline: Any, schedule: Schedule) -> hrt.CompiledModel:
    return hrt.compile(pipeline.transformer, schedule, lowering="plain")


def assign(pipeline: Any, schedule: Schedule) -> Any:
    pipeline.transformer = compiled_model(pipeline, schedule)
    return pipeline


def register(pipeline: Any, schedule: Schedule) -> Any:
    pipeline.register_modules(transformer=compiled_model(pipeline, schedule))
    return pipeline


def construct(pipeline: Any, schedule: Schedule) -> Any:
    return quiet(d.DiTPipeline(compiled_model(pipeline, schedule), pipeline.vae, pipeline.scheduler))


@pytest.mark.parametrize("put_in", [assign, register, construct])
def test_an_assigned_compiled_model_works_as_a_compiled_pipeline(
    put_in: Callable[..., Any], pipeline: Any, schedule: Schedule
) -> None:
    plain = pipeline.transformer
    expected = [sample(hrt.compile(made(), schedule, lowering="plain"), STEPS, seed, **CALL) for seed in (0, 0)]
    pipeline = put_in(pipeline, schedule)
    held = pipeline.transformer
    got = [sample(pipeline, STEPS, 0, **CALL) for _ in range(2)]
    np.testing.assert_array_equal(got, expected)
    assert pipeline.transformer is plain
    assert hrt.get_compiled(pipeline) is held
    assert held.report().last_cur == pytest.approx(schedule.cur)
    hrt.uncompile(pipeline)
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), sample(made(), STEPS, **CALL))


def test_two_calls_a_step_are_one_step() -> None:
    family = shallow("flux")  # true guidance calls twice per step
    images = []
    for compile_it in (lambda pipe, s: hrt.compile(pipe, s, lowering="plain"), assign):
        torch.manual_seed(0)
        pipeline = quiet(family.build())
        compile_it(pipeline, random_schedule(pipeline.transformer, STEPS))
        images.append([sample(pipeline, STEPS, **arguments) for arguments in (family.guided, family.unguided)])
    np.testing.assert_array_equal(images[0][0], images[1][0])
    np.testing.assert_array_equal(images[0][1], images[1][1])


def test_the_reference_can_be_assigned(pipeline: Any, schedule: Schedule) -> None:
    expected = sample(hrt.reference(made(), schedule), STEPS, **CALL)
    pipeline.transformer = hrt.reference(pipeline.transformer, schedule)
    for _ in range(2):
        np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_a_call_by_hand_before_the_pipeline_shifts_no_step(pipeline: Any, schedule: Schedule) -> None:
    expected = sample(hrt.compile(made(), schedule, lowering="plain"), STEPS, **CALL)
    assign(pipeline, schedule)
    with torch.no_grad():
        pipeline.transformer(torch.randn(2, 4, 4, 4), timestep=torch.tensor([9, 9]), class_labels=torch.tensor([1, 2]))
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)


@pytest.mark.parametrize("run_before", [False, True])
def test_saving_keeps_the_transformer(pipeline: Any, schedule: Schedule, tmp_path: Path, run_before: bool) -> None:
    expected = sample(pipeline, STEPS, **CALL)
    assign(pipeline, schedule)
    if run_before:
        sample(pipeline, STEPS, **CALL)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    loaded = quiet(d.DiTPipeline.from_pretrained(tmp_path))
    np.testing.assert_array_equal(sample(loaded, STEPS, **CALL), expected)


def test_moving_the_pipeline_moves_it(pipeline: Any, schedule: Schedule) -> None:
    assign(pipeline, schedule)
    pipeline.to(torch.float64)
    assert pipeline.transformer.dtype is torch.float64
    images = sample(pipeline, STEPS, **CALL)
    hrt.reference(pipeline, schedule)
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), images)


def test_hooks_of_accelerate_go_to_the_model(pipeline: Any, schedule: Schedule) -> None:
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    expected = sample(hrt.compile(made(), schedule, lowering="plain"), STEPS, **CALL)
    assign(pipeline, schedule)
    hook = Counting()
    add_hook_to_module(pipeline.transformer, hook)  # as enable_model_cpu_offload does
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)
    assert hook.calls == STEPS
    remove_hook_from_module(pipeline.transformer)
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)
    assert hook.calls == STEPS


def test_another_pipeline_can_be_made_with_the_compiled_model(pipeline: Any, schedule: Schedule) -> None:
    assign(pipeline, schedule)
    other = quiet(d.DiTPipeline(**pipeline.components))
    expected = sample(hrt.compile(made(), schedule, lowering="plain"), STEPS, **CALL)
    for one in (other, pipeline, other):
        np.testing.assert_array_equal(sample(one, STEPS, **CALL), expected)


@pytest.mark.parametrize("function", ["compile", "reference", "verify", "uncompile", "get_compiled", "load"])
def test_every_function_takes_the_pipeline(pipeline: Any, schedule: Schedule, function: str, tmp_path: Path) -> None:
    plain = pipeline.transformer
    assign(pipeline, schedule)
    held = pipeline.transformer
    if function == "verify":
        hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **CALL)
        assert hrt.get_compiled(pipeline) is held
    elif function == "load":
        sample(pipeline, STEPS, **CALL)
        held.save(tmp_path / "plan.json")
        assign(pipeline, schedule)
        hrt.load(tmp_path / "plan.json", pipeline)
        assert hrt.get_compiled(pipeline) is not held
    elif function == "get_compiled":
        assert hrt.get_compiled(pipeline) is held
    elif function == "uncompile":
        hrt.uncompile(pipeline)
        assert "_compiled_call_impl" not in plain.__dict__
        assert type(pipeline.scheduler) is d.DDIMScheduler
    else:
        getattr(hrt, function)(pipeline, schedule)
        assert plain.__dict__["_compiled_call_impl"] is not held
    assert pipeline.transformer is plain


def test_a_model_may_be_assigned_in_mid_run(pipeline: Any, schedule: Schedule) -> None:
    scheduler, latents = pipeline.scheduler, torch.randn(1, 4, 4, 4)

    class Loop:
        def __init__(self) -> None:
            self.scheduler, self.transformer = scheduler, pipeline.transformer

        def __call__(self) -> None:
            scheduler.set_timesteps(STEPS)
            for step, timestep in enumerate(scheduler.timesteps):
                if step == 2:
                    self.transformer = compiled_model(pipeline, schedule)
                with torch.no_grad():
                    noise = self.transformer(latents, timestep[None], class_labels=torch.tensor([1])).sample
                scheduler.step(noise, timestep, latents)

    with pytest.raises(RunError, match="step 0 was stepped with timestep"):
        Loop()()


def test_a_compiled_model_assigned_elsewhere_is_an_error(pipeline: Any, schedule: Schedule) -> None:
    pipeline.transformer_2 = hrt.compile(shallow_dit().transformer, schedule)
    message = r"DiTPipeline\.transformer_2 is a compiled model, .* pipe\.transformer_2 = pipe\.transformer_2\.model"
    with pytest.raises(HarmonicaError, match=message):
        hrt.compile(pipeline, schedule)


def test_a_compiled_model_passes_for_the_model(pipeline: Any, schedule: Schedule) -> None:
    compiled = compiled_model(pipeline, schedule)
    assert isinstance(compiled, d.DiTTransformer2DModel)
    assert isinstance(compiled, hrt.CompiledModel)
    assert type(compiled) is hrt.CompiledModel
    assert compiled.eval() is compiled
    assert "CompiledModel of a DiTTransformer2DModel" in repr(compiled)


def test_a_module_that_holds_it_has_its_parameters(pipeline: Any, schedule: Schedule) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = compiled_model(pipeline, schedule)

    holder = Holder()
    assert set(holder.state_dict()) == {f"inner.{name}" for name in pipeline.transformer.state_dict()}
    holder.to(torch.float64)
    assert pipeline.transformer.dtype is torch.float64


class CountsItsOwnSteps:
    """A pipeline of one's own that begins the runs of a compiled model by itself."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.scheduler = d.DDIMScheduler()

    def __call__(self, steps: int) -> list[torch.Tensor]:
        self.denoiser.reset()
        self.scheduler.set_timesteps(steps)
        return [self.denoiser(**stack_call(step)) for step in range(steps)]


def test_a_pipeline_that_resets_the_model_counts_its_own_steps() -> None:
    model = stack()
    compiled = hrt.compile(model, Schedule.every(2, steps=4, sites=hrt.find_sites(model)))
    pipeline = CountsItsOwnSteps(compiled)
    first, second = pipeline(4), pipeline(4)
    assert pipeline.denoiser is compiled
    assert all(torch.allclose(a, b) for a, b in zip(first, second, strict=True))
    assert compiled.report().last_calls == 4
