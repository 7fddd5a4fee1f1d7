"""Copies and pickles of what is compiled, and that nothing compiled keeps memory alive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from tests import tiny
from tests.models import Stack, random_schedule, stack, stack_call

STEPS = 4


def through_torch_save(value: Any) -> Any:
    """What `torch.load` gives back of it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


@pytest.fixture(params=WAYS)
def copied(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """One way to copy."""
    return WAYS[request.param]


def outputs(compiled: Any) -> list[torch.Tensor]:
    """One run."""
    compiled.reset()
    return [compiled(**stack_call(step)) for step in range(STEPS)]


def image(pipeline: Any) -> torch.Tensor:
    """One image of a DiT pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline([1], num_inference_steps=STEPS, generator=generator, output_type="np")
    return torch.from_numpy(result.images)


@dataclass(frozen=True)
class CompiledPipeline:
    """A compiled pipeline, its image when it was plain, and its image now. Tests copy it and leave it as it is."""

    pipeline: Any
    plain: torch.Tensor
    compiled: torch.Tensor


def compile_plainly(pipeline: Any) -> None:
    hrt.compile(pipeline, random_schedule(pipeline.transformer, STEPS, seed=1), lowering="plain")


@pytest.fixture(scope="module")
def one() -> CompiledPipeline:
    torch.manual_seed(0)
    pipeline = tiny.dit()
    plain = image(pipeline)
    compile_plainly(pipeline)
    return CompiledPipeline(pipeline, plain, image(pipeline))


class TestCompiledModel:
    @pytest.mark.parametrize("make", [hrt.compile, hrt.reference])
    def test_a_copy_works_and_has_runs_of_its_own(self, make: Any, copied: Callable[[Any], Any]) -> None:
        model = stack()
        compiled = make(model, random_schedule(model, STEPS, seed=1))
        expected = outputs(compiled)
        compiled.reset()
        first = compiled(**stack_call(0))
        other = copied(compiled)
        assert type(other) is type(compiled)
        assert other.schedule == compiled.schedule
        assert all(map(torch.equal, outputs(other), expected))
        rest = [compiled(**stack_call(step)) for step in range(1, STEPS)]  # goes on where it was
        assert all(map(torch.equal, [first, *rest], expected))

    def test_a_deep_copy_has_weights_of_its_own(self) -> None:
        model = stack()
        compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1))
        expected = outputs(compiled)
        other = copy.deepcopy(compiled)
        with torch.no_grad():
            model.blocks[0].attn.weight.zero_()
        assert all(map(torch.equal, outputs(other), expected))
        assert not torch.equal(outputs(compiled)[-1], expected[-1])

    def test_options_are_copied(self, copied: Callable[[Any], Any]) -> None:
        model = stack()
        schedule = random_schedule(model, STEPS, seed=1)
        compiled = hrt.compile(model, schedule, lowering="plain", max_plans=3, strict=True, graphs="off")
        assert copied(compiled).engine.options == compiled.engine.options
        verified = hrt.compile(model, schedule, lowering="plain", verify=True)
        assert type(copied(verified).engine) is type(verified.engine) is not type(compiled.engine)

    def test_a_pickle_that_was_written_when_api_was_one_file_can_be_read(self) -> None:
        model = stack()
        compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1))
        data = pickle.dumps(compiled, protocol=0)
        now, then = b"charmonica_rt.api.compiled_model\n_compile_copy\n", b"charmonica_rt.api\n_compiled_again\n"
        assert data.count(now) == 1
        assert all(map(torch.equal, outputs(pickle.loads(data.replace(now, then))), outputs(compiled)))

    def test_a_copy_of_one_in_a_pipeline_is_a_model_by_itself(
        self, one: CompiledPipeline, copied: Callable[[Any], Any]
    ) -> None:
        other = copied(hrt.get_compiled(one.pipeline))
        assert not other.pipelines
        assert torch.equal(image(one.pipeline), one.compiled)


class TestPipeline:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_is_plain(self, one: CompiledPipeline, way: str) -> None:
        assert not torch.equal(one.plain, one.compiled)
        other = WAYS[way](one.pipeline)
        assert torch.equal(image(other), one.plain)
        assert torch.equal(image(one.pipeline), one.compiled)
        compile_plainly(other)
        assert torch.equal(image(other), one.compiled)

    def test_a_shallow_copy_shares_the_compiled_module(self) -> None:
        pipeline = tiny.dit()
        compile_plainly(pipeline)
        compiled = image(pipeline)
        other = copy.copy(pipeline)
        del pipeline
        gc.collect()
        assert torch.equal(image(other), compiled)

    def test_copies_of_the_components_are_plain(self, one: CompiledPipeline, copied: Callable[[Any], Any]) -> None:
        parts = {name: copied(part) for name, part in one.pipeline.components.items()}
        assert torch.equal(image(type(one.pipeline)(**parts)), one.plain)

    def test_one_that_was_assigned_to_a_pipeline_is_copied_with_it(self) -> None:
        pipeline = tiny.dit()
        schedule = random_schedule(pipeline.transformer, STEPS, seed=1)
        pipeline.transformer = hrt.compile(pipeline.transformer, schedule, lowering="plain")
        other = copy.deepcopy(pipeline)
        assert other.transformer.model is not pipeline.transformer.model
        assert torch.equal(image(other), image(pipeline))


def test_the_session_of_a_torch_compiled_model_cannot_be_copied(copied: Callable[[Any], Any]) -> None:
    model = stack()
    options = {"schedule": random_schedule(model, STEPS, seed=1)}
    session = hrt.attach(torch.compile(model, backend="harmonica", options=options))
    with pytest.raises(hrt.HarmonicaError, match="copy the plain model"):
        copied(session)


class TestMemory:
    def test_a_compiled_model_frees_its_model_and_plans(self) -> None:
        model: Stack | None = stack()
        compiled: Any = hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True)
        outputs(compiled)
        held = [weakref.ref(compiled), weakref.ref(model), weakref.ref(*compiled.plans.values())]
        del model, compiled
        gc.collect()
        assert [one() for one in held] == [None] * 3

    @pytest.mark.parametrize("make", [hrt.compile, hrt.reference])
    def test_tensors_that_were_replaced_are_freed(self, make: Any) -> None:
        """Weights, and tensors that hang on a module as plain attributes."""
        model = stack()
        model.blocks[1].table = torch.randn(8)
        compiled = make(model, random_schedule(model, STEPS, seed=1))
        outputs(compiled)
        held = [weakref.ref(model.blocks[0].attn.weight), weakref.ref(model.blocks[1].table)]
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        model.blocks[1].table = torch.randn(8)
        outputs(compiled)
        gc.collect()
        assert [one() for one in held] == [None] * 2

    def test_tensors_replaced_in_mid_run_are_freed_in_the_next(self) -> None:
        model = stack()
        compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1))
        compiled.reset()
        compiled(**stack_call(0))
        held = weakref.ref(model.blocks[0].attn.weight)
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        compiled(**stack_call(1))
        outputs(compiled)
        gc.collect()
        assert held() is None
