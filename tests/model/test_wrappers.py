"""Denoisers that others wrapped: what is inside is planned, and the wrapper stays in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import distributed, nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.wrappers import unwrapped
from tests.models import stack, stack_call
from tests.tiny import random_schedule, sample, shallow_dit

STEPS = 4
CALL = {"class_labels": [1, 2]}


class Passing(nn.Module):
    """A wrapper of one's own: it takes anything and passes it on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Doubling(Passing):
    """One that changes what comes out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    wrapped = peft.PeftModel(model, peft.LoraConfig(target_modules=["to_q", "to_k", "proj", "linear_1"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Of one process, which DistributedDataParallel needs."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model).eval()


def by_torch_compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def by_both(model: nn.Module) -> nn.Module:
    return by_torch_compile(with_lora(model))


WRAPPERS = [with_lora, by_torch_compile, by_both]


@pytest.fixture(params=WRAPPERS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = shallow_dit()
    made.set_progress_bar_config(disable=True)
    made.transformer = request.param(made.transformer)
    return made


@pytest.fixture
def schedule() -> Schedule:
    torch.manual_seed(0)
    return random_schedule(shallow_dit().transformer, STEPS)


def assigned(pipeline: Any, schedule: Schedule) -> None:
    pipeline.transformer = hrt.compile(pipeline.transformer, schedule, lowering="plain")


def compiled(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule, lowering="plain")


@pytest.mark.parametrize("door", [compiled, assigned])
def test_a_pipeline_with_a_wrapped_denoiser_runs_its_plan(
    pipeline: Any, schedule: Schedule, door: Callable[[Any, Schedule], None]
) -> None:
    wrapper = pipeline.transformer
    plain = sample(pipeline, STEPS, **CALL)
    expected = sample(hrt.reference(pipeline, schedule), STEPS, **CALL)
    assert not np.array_equal(expected, plain)
    hrt.uncompile(pipeline)
    door(pipeline, schedule)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)
    assert pipeline.transformer is wrapper
    assert hrt.get_compiled(pipeline).stats.calls == STEPS
    hrt.uncompile(pipeline)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), plain)
    assert pipeline.transformer is wrapper


def test_verify_and_a_saved_plan(pipeline: Any, schedule: Schedule, tmp_path: Path) -> None:
    assert hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **CALL).ok
    hrt.compile(pipeline, schedule, lowering="plain")
    expected = sample(pipeline, STEPS, **CALL)
    hrt.get_compiled(pipeline).save(tmp_path / "plan.json")
    hrt.uncompile(pipeline)
    hrt.load(tmp_path / "plan.json", pipeline)
    assert np.array_equal(sample(pipeline, STEPS, **CALL), expected)


@pytest.mark.parametrize("wrap", [*WRAPPERS, parallel])
def test_the_model_by_itself(wrap: Callable[[nn.Module], nn.Module], schedule: Schedule) -> None:
    torch.manual_seed(0)
    transformer = shallow_dit().transformer
    wrapper = wrap(transformer)
    assert hrt.find_sites(wrapper) == hrt.find_sites(transformer)
    assert hrt.model_info(wrapper) == hrt.model_info(transformer)
    quick = hrt.compile(wrapper, schedule, lowering="plain")
    truth = hrt.reference(wrapper, schedule)
    quick.reset()
    truth.reset()
    for step in range(STEPS):
        x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 900 - 200 * step)
        given = (x, t, torch.tensor([1, 2]))
        assert torch.equal(quick(*given, return_dict=False)[0], truth(*given, return_dict=False)[0])


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_copy_has_the_wrapper(wrap: Callable[[nn.Module], nn.Module], schedule: Schedule) -> None:
    truth = hrt.reference(wrap(shallow_dit().transformer), schedule)
    copied = copy.deepcopy(truth)
    assert type(copied.given) is type(truth.given)
    assert copied.model is not truth.model
    assert copied.model is unwrapped(copied.given)


def test_the_attributes_are_the_wrappers(schedule: Schedule) -> None:
    quick = hrt.compile(with_lora(shallow_dit().transformer), schedule)
    assert quick.active_adapters == ["default"]
    assert quick.eval() is quick


@pytest.mark.parametrize("wrapper", [Passing, Doubling])
def test_a_wrapper_of_ones_own_is_captured_with_what_it_does(wrapper: type[Passing]) -> None:
    model = wrapper(stack()).eval()
    sites = hrt.find_sites(model)
    assert all(site.startswith("inner.") for site in sites)
    schedule = Schedule.every(2, steps=STEPS, sites=sites)
    quick, truth = hrt.compile(model, schedule, lowering="plain", strict=True), hrt.reference(model, schedule)
    quick.reset()
    truth.reset()
    for step in range(STEPS):
        given = tuple(stack_call(step).values())
        assert torch.equal(quick(*given), truth(*given))


def test_uncompiling_one_of_two_pipelines_gives_the_others_wrapper_back(schedule: Schedule) -> None:
    torch.manual_seed(0)
    first = shallow_dit()
    second = type(first)(first.transformer, first.vae, type(first.scheduler).from_config(first.scheduler.config))
    first.transformer = by_torch_compile(first.transformer)
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
        hrt.compile(pipeline, schedule)
    hrt.uncompile(second)
    assert first.transformer.__dict__.get("_compiled_call_impl") is None


def test_a_wrapper_around_a_compiled_model_is_refused(schedule: Schedule) -> None:
    compiled = hrt.compile(shallow_dit().transformer, schedule)
    with pytest.raises(hrt.HarmonicaError, match=r"wraps a compiled DiTTransformer2DModel.*_orig_mod\.model"):
        hrt.compile(torch.compile(compiled, backend="eager"), schedule)  # type: ignore[call-overload]


@pytest.mark.parametrize("wrap", [with_lora, by_torch_compile, parallel])
def test_hooks_of_a_wrapper_run(wrap: Callable[[nn.Module], nn.Module], schedule: Schedule) -> None:
    torch.manual_seed(0)
    wrapper = wrap(shallow_dit().transformer)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([1]),
    }
    plain = wrapper(**given, return_dict=False)[0]
    wrapper.register_forward_hook(lambda module, args, output: (2 * output[0],))
    for make in (hrt.compile, hrt.reference):
        assert torch.allclose(make(wrapper, schedule)(**given, return_dict=False)[0], 2 * plain, atol=1e-5)


def test_hooks_of_torch_compiles_wrapper_run_in_a_pipeline(schedule: Schedule) -> None:
    torch.manual_seed(0)
    pipeline = shallow_dit()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer = by_torch_compile(pipeline.transformer)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    hrt.compile(pipeline, schedule)
    sample(pipeline, STEPS, **CALL)
    assert len(calls) == STEPS


def test_a_wrapper_that_is_put_back_later_runs_as_before(schedule: Schedule) -> None:
    torch.manual_seed(0)
    pipeline = shallow_dit()
    pipeline.set_progress_bar_config(disable=True)
    wrapper = pipeline.transformer = by_torch_compile(pipeline.transformer)
    hrt.compile(pipeline, schedule)
    pipeline.transformer = wrapper._orig_mod
    hrt.uncompile(pipeline)
    pipeline.transformer = wrapper
    sample(pipeline, STEPS, **CALL)
    assert wrapper.__dict__.get("_compiled_call_impl") is None


class Doubled(peft.PeftModel):
    """One with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (2 * super().forward(*args, **kwargs)[0],)


def test_a_class_derived_from_a_wrapper_is_the_model_itself(schedule: Schedule) -> None:
    model = Doubled(shallow_dit().transformer, peft.LoraConfig(target_modules=["to_q"])).eval()
    assert unwrapped(model) is model
