"""Interrupted at any line, by Ctrl-C or whatever raises there: nothing stays changed, and the next run is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.pipelines.install import installed
from harmonica_rt.sampling.scheduler import listener_of
from tests.models import SITES, stack, stack_call
from tests.sampling.interruptions import interruptions, state
from tests.tiers import member
from tests.tiny import families, random_schedule, sample, shallow_dit

STEPS = 3


def at_lines(some: int) -> pytest.MarkDecorator:
    """How many interruptions of each of the two kinds an operation gets, as `interruptions.chosen` picks them."""
    return pytest.mark.parametrize("most", [member(some, id="some", always=True), member(24, id="many", always=False)])


class Counting(nn.Module):
    """A model that reads how long its prompt is, so that it is traced twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(depth=2)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As `Stack`, with the first tokens of the mask added up."""
        length = int(mask.sum().item())
        return self.inner(latents, timestep) + mask[:, :length].sum() + mask.tolist()[0][0]


def model_of(kind: str) -> tuple[nn.Module, Schedule, list[dict[str, Any]]]:
    """A model, a schedule and the calls of a run."""
    mask = {"mask": torch.tensor([[1, 1, 0, 0]])} if kind == "reads" else {}
    calls = [{**stack_call(step), **mask} for step in range(STEPS)]
    model: nn.Module = Counting().eval() if kind == "reads" else stack(depth=2)
    if kind == "hooked":
        model.register_forward_hook(lambda module, args, output: output * 2)
    patterns = [f"inner.{site}" for site in SITES] if kind == "reads" else SITES
    return model, Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=patterns)), calls


def run_of(denoiser: Any, calls: list[dict[str, Any]]) -> torch.Tensor:
    denoiser.reset()
    return torch.stack([denoiser(**call) for call in calls])


@at_lines(some=3)
@pytest.mark.parametrize("make", [hrt.compile, hrt.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("kind", ["plain", "hooked", "reads"])
def test_an_interrupted_call_changes_nothing(kind: str, make: Callable[..., Any], most: int) -> None:
    model, schedule, calls = model_of(kind)
    plain = [model(**call).detach() for call in calls]
    expected = run_of(make(model, schedule), calls)
    before, denoiser = state(model), make(model, schedule)

    def new() -> None:
        nonlocal denoiser
        denoiser = make(model, schedule)

    def first() -> None:
        denoiser(**calls[0])

    def later() -> None:
        denoiser(**calls[1])

    def after_the_first() -> None:
        denoiser.reset()
        denoiser(**calls[0])

    for operation, prepare in ((first, new), (later, after_the_first), (lambda: run_of(denoiser, calls), lambda: None)):
        for place in interruptions(operation, most, prepare):
            assert state(model) == before, place
            assert all(torch.equal(model(**call), output) for call, output in zip(calls, plain, strict=True)), place
            assert torch.equal(run_of(denoiser, calls), expected), place


@at_lines(some=3)
def test_an_interrupted_run_does_not_go_on(most: int) -> None:
    model, schedule, calls = model_of("plain")
    denoiser = hrt.compile(model, schedule)
    expected = run_of(denoiser, calls)

    def begin() -> None:
        denoiser.reset()
        denoiser(**calls[0])

    for place in interruptions(lambda: denoiser(**calls[1]), most, begin):
        is_over, refusal = denoiser.stats.calls == 2, None
        try:
            second = denoiser(**calls[1])
        except hrt.HarmonicaError as error:
            refusal = str(error)
        # where there is none, it was interrupted before anything had been done, or after all had
        assert "failed" in refusal if refusal else is_over or torch.equal(second, expected[1]), place


@at_lines(some=3)
def test_an_interrupted_verification_changes_nothing(most: int) -> None:
    model, schedule, calls = model_of("hooked")
    plain, before = model(**calls[0]), state(model)
    for place in interruptions(lambda: hrt.verify(model, schedule, calls=calls), most):
        assert state(model) == before, place
        assert torch.equal(model(**calls[0]), plain), place


@at_lines(some=3)
def test_an_interrupted_save_leaves_a_whole_file_or_none(tmp_path: Path, most: int) -> None:
    model, schedule, calls = model_of("plain")
    compiled, path = hrt.compile(model, schedule, lowering="plain"), tmp_path / "plan.json"
    expected = run_of(compiled, calls)
    for place in interruptions(lambda: compiled.save(path), most, lambda: path.unlink(missing_ok=True)):
        assert [file.name for file in tmp_path.iterdir()] in ([], [path.name]), place
        if path.exists():
            assert torch.equal(run_of(hrt.load(path, model), calls), expected), place


@at_lines(some=3)
def test_an_interrupted_load_changes_nothing(tmp_path: Path, most: int) -> None:
    model, schedule, calls = model_of("plain")
    compiled, path = hrt.compile(model, schedule, lowering="plain"), tmp_path / "plan.json"
    expected = run_of(compiled, calls)
    before = state(model)
    compiled.save(path)
    for place in interruptions(lambda: hrt.load(path, model), most):
        assert state(model) == before, place
        assert torch.equal(run_of(hrt.load(path, model), calls), expected), place


@at_lines(some=3)
def test_an_interrupted_call_behind_torch_compile_changes_nothing(most: int) -> None:
    model, schedule, calls = model_of("plain")
    plain, expected = model(**calls[0]), run_of(hrt.compile(model, schedule, lowering="plain"), calls)
    traced: Any = torch.compile(model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    session: Any = None

    def run() -> torch.Tensor:
        session.reset()
        return torch.stack([traced(**call) for call in calls])

    def begin() -> None:
        session.reset()
        traced(**calls[0])

    try:
        with torch.no_grad():
            traced(**calls[0])
            session = hrt.attach(traced)
            before = state(model)
            for place in interruptions(lambda: traced(**calls[1]), most, begin):
                assert state(model) == before, place
                assert torch.equal(run(), expected), place
                assert torch.equal(model(**calls[0]), plain), place
    finally:
        torch._dynamo.reset()


class PipelineUnderTest:
    """A pipeline of DiT, what its transformer looks like when it is not compiled, and its images in both states."""

    def __init__(self) -> None:
        self.call = families()["dit"].unguided
        self.pipeline = shallow_dit()
        self.pipeline.set_progress_bar_config(disable=True)
        self.schedule = random_schedule(self.pipeline.transformer, STEPS)
        self.before = state(self.pipeline.transformer)
        self.plain = self.images()
        self.compile()
        self.under_schedule = self.images()

    def images(self) -> Any:
        return sample(self.pipeline, STEPS, **self.call)

    def compile(self) -> None:
        hrt.compile(self.pipeline, self.schedule)

    def uncompile(self) -> None:
        hrt.uncompile(self.pipeline)


@at_lines(some=2)
@pytest.mark.parametrize("operation", ["compile", "compile again", "uncompile"])
def test_a_pipeline_whose_compilation_was_interrupted_is_compiled_or_not(operation: str, most: int) -> None:
    tested = PipelineUnderTest()
    transformer, scheduler = tested.pipeline.transformer, tested.pipeline.scheduler
    interrupted = tested.uncompile if operation == "uncompile" else tested.compile
    prepare = tested.uncompile if operation == "compile" else tested.compile
    for place in interruptions(interrupted, most, prepare):
        mine = installed(transformer)
        assert (mine is None) or listener_of(scheduler) is mine, place
        assert (tested.images() == (tested.plain if mine is None else tested.under_schedule)).all(), place
        tested.uncompile()
        assert listener_of(scheduler) is None, place
        assert state(transformer) == tested.before, place
        assert (tested.images() == tested.plain).all(), place


@at_lines(some=1)
@pytest.mark.parametrize("operation", ["sample", "verify"])
def test_a_compiled_pipeline_stays_compiled_when_it_is_interrupted(operation: str, most: int) -> None:
    tested = PipelineUnderTest()
    transformer, compiled = tested.pipeline.transformer, state(tested.pipeline.transformer)

    def verify() -> None:
        hrt.verify(tested.pipeline, tested.schedule, num_inference_steps=STEPS, **tested.call)

    for place in interruptions(verify if operation == "verify" else tested.images, most):
        assert state(transformer) == compiled, place
        assert (tested.images() == tested.under_schedule).all(), place
    tested.uncompile()
    assert state(transformer) == tested.before
