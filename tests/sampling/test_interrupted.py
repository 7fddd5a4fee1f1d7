"""Interrupted at any line, by Ctrl-C or whatever raises there: nothing stays changed, and the next run is right.

A tracer raises KeyboardInterrupt before the n-th line that runs in this package or in `contextlib`, once for each n
(where there are many, for the first and the last time that each line runs, and of those for a sample).
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensor

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.pipelines.install import installed
from harmonica_rt.sampling.scheduler import listener_of
from tests.models import SITES, stack, stack_call
from tests.tiny import families, random_schedule, sample

STEPS = 4
MOST = 24  # interruptions of one operation
TRACED = (str(Path(hrt.__file__).parent), contextlib.__file__)

Place = tuple[str, int]


class Tracer:
    """Notes the lines that run, and raises KeyboardInterrupt before the one with index `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.lines: list[Place] = []
        self._at = at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Called by Python for each new frame."""
        return self._line if frame.f_code.co_filename.startswith(TRACED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self._at:
                raise KeyboardInterrupt
        return self._line

    def run(self, operation: Callable[[], object]) -> list[Place]:
        """The lines of an operation, up to where it was interrupted."""
        sys.settrace(self)
        try:
            operation()
        except KeyboardInterrupt:
            assert self._at is not None
        finally:
            sys.settrace(None)
        return self.lines


def chosen(lines: list[Place]) -> list[int]:
    """Where to interrupt an operation that runs these lines."""
    indices = list(range(len(lines)))
    if len(indices) > MOST:
        first = dict(zip(reversed(lines), reversed(indices), strict=True))
        last = dict(zip(lines, indices, strict=True))
        indices = sorted({*first.values(), *last.values()})
    if len(indices) > MOST:
        changing = [
            i
            for i in indices
            if lines[i][0].endswith(("changes.py", "torch_state.py", "reference_engine.py", "contextlib.py"))
        ]
        indices = sorted({*changing[:MOST], *random.Random(0).sample(indices, MOST)})
    return indices


def interruptions(operation: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Iterator[str]:
    """Yields after each interruption of `operation`, prepared anew each time; where it came."""
    prepare()
    lines = Tracer().run(operation)
    assert len(lines) > 10, "the tracer sees nothing of this package"
    for index in chosen(lines):
        prepare()
        Tracer(index).run(operation)
        file, line = lines[index]
        yield f"interrupted before {file}:{line}"


def state(model: nn.Module) -> list[Any]:
    """All that an interruption might leave changed, in the model and in this thread."""
    held = [(name, list(module.__dict__.items())) for name, module in model.named_modules()]
    seen = [
        (path, name, sorted(value, key=str) if isinstance(value, dict) else id(value))
        for path, items in held
        for name, value in items
    ]
    return [
        seen,
        FakeTensor.__dict__["tolist"],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_autocast_enabled("cpu"),
        compile_lock._is_owned(),
    ]


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


@pytest.mark.parametrize("make", [hrt.compile, hrt.reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("kind", ["plain", "hooked", "reads"])
def test_calls(kind: str, make: Callable[..., Any]) -> None:
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
        for place in interruptions(operation, prepare):
            assert state(model) == before, place
            assert all(torch.equal(model(**call), output) for call, output in zip(calls, plain, strict=True)), place
            assert torch.equal(run_of(denoiser, calls), expected), place


def test_an_interrupted_run_does_not_go_on() -> None:
    model, schedule, calls = model_of("plain")
    denoiser = hrt.compile(model, schedule)
    expected = run_of(denoiser, calls)

    def begin() -> None:
        denoiser.reset()
        denoiser(**calls[0])

    for place in interruptions(lambda: denoiser(**calls[1]), begin):
        is_over, refusal = denoiser.stats.calls == 2, None
        try:
            second = denoiser(**calls[1])
        except hrt.HarmonicaError as error:
            refusal = str(error)
        # where there is none, it was interrupted before anything had been done, or after all had
        assert "failed" in refusal if refusal else is_over or torch.equal(second, expected[1]), place


def test_verify() -> None:
    model, schedule, calls = model_of("hooked")
    plain, before = model(**calls[0]), state(model)
    for place in interruptions(lambda: hrt.verify(model, schedule, calls=calls)):
        assert state(model) == before, place
        assert torch.equal(model(**calls[0]), plain), place


def test_save_and_load(tmp_path: Path) -> None:
    """A file is there whole or not at all, and nothing else is left in its folder."""
    model, schedule, calls = model_of("plain")
    compiled, path = hrt.compile(model, schedule, lowering="plain"), tmp_path / "plan.json"
    expected = run_of(compiled, calls)
    before = state(model)
    for place in interruptions(lambda: compiled.save(path), lambda: path.unlink(missing_ok=True)):
        assert [file.name for file in tmp_path.iterdir()] in ([], [path.name]), place
        if path.exists():
            assert torch.equal(run_of(hrt.load(path, model), calls), expected), place
    compiled.save(path)
    for place in interruptions(lambda: hrt.load(path, model)):
        assert state(model) == before, place
        assert torch.equal(run_of(hrt.load(path, model), calls), expected), place


def test_behind_torch_compile() -> None:
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
            for place in interruptions(lambda: traced(**calls[1]), begin):
                assert state(model) == before, place
                assert torch.equal(run(), expected), place
                assert torch.equal(model(**calls[0]), plain), place
    finally:
        torch._dynamo.reset()


def test_pipelines() -> None:
    """Compile, run, verify and uncompile a pipeline; what is interrupted may be done or not, but not by half."""
    family = families()["dit"]
    pipeline = family.build()
    pipeline.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipeline.transformer, STEPS)
    before, scheduler = state(pipeline.transformer), pipeline.scheduler
    plain = sample(pipeline, STEPS, **family.unguided)
    hrt.compile(pipeline, schedule)
    under_schedule, compiled = sample(pipeline, STEPS, **family.unguided), state(pipeline.transformer)

    def check(place: str) -> None:
        mine = installed(pipeline.transformer)
        assert (mine is None) or listener_of(scheduler) is mine, place
        images = sample(pipeline, STEPS, **family.unguided)
        assert (images == (plain if mine is None else under_schedule)).all(), place
        hrt.uncompile(pipeline)
        assert listener_of(scheduler) is None, place
        assert state(pipeline.transformer) == before, place
        assert (sample(pipeline, STEPS, **family.unguided) == plain).all(), place

    for operation, prepare in (
        (lambda: hrt.compile(pipeline, schedule), lambda: hrt.uncompile(pipeline)),
        (lambda: hrt.compile(pipeline, schedule), lambda: hrt.compile(pipeline, schedule)),
        (lambda: hrt.uncompile(pipeline), lambda: hrt.compile(pipeline, schedule)),
    ):
        for place in interruptions(operation, prepare):
            check(place)

    hrt.compile(pipeline, schedule)
    assert len(state(pipeline.transformer)[0]) == len(compiled[0])
    compiled = state(pipeline.transformer)
    for place in interruptions(lambda: sample(pipeline, STEPS, **family.unguided)):
        assert state(pipeline.transformer) == compiled, place
        assert (sample(pipeline, STEPS, **family.unguided) == under_schedule).all(), place
    for place in interruptions(lambda: hrt.verify(pipeline, schedule, num_inference_steps=STEPS, **family.unguided)):
        assert state(pipeline.transformer) == compiled, place
        assert (sample(pipeline, STEPS, **family.unguided) == under_schedule).all(), place
    hrt.uncompile(pipeline)
    assert state(pipeline.transformer) == before
