"""`harmonica_rt.compile` and torch.compile on one model: which of the two holds, or what to undo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import ArgumentError, HarmonicaError
from tests.models import SITES, stack, stack_call
from tests.tiny import built, random_schedule, sample, shallow_dit

STEPS = 4
CALL = {"class_labels": [1, 2]}


@pytest.fixture
def pipeline() -> Any:
    return built(shallow_dit)


@pytest.fixture
def schedule(pipeline: Any) -> Schedule:
    return random_schedule(pipeline.transformer, STEPS)


def through_torch(pipeline: Any, schedule: Schedule, *, in_place: bool) -> None:
    options: dict[str, Any] = {"schedule": schedule, "lowering": "plain"}
    if in_place:
        pipeline.transformer.compile(backend="harmonica", options=options)
    else:
        pipeline.transformer = torch.compile(pipeline.transformer, backend="harmonica", options=options)


@pytest.mark.parametrize("function", ["compile", "reference", "verify"])
def test_the_error_for_a_model_behind_torch_compile_names_detach(
    pipeline: Any, schedule: Schedule, function: str
) -> None:
    through_torch(pipeline, schedule, in_place=False)
    hrt.attach(pipeline)
    for subject in (pipeline, pipeline.transformer):
        with pytest.raises(HarmonicaError, match=r"compiled already, by torch\.compile.*\.detach\(\).*\._orig_mod"):
            getattr(hrt, function)(subject, schedule)
    hrt.attach(pipeline.transformer).detach()
    pipeline.transformer = pipeline.transformer._orig_mod
    hrt.compile(pipeline, schedule)


def test_the_error_for_a_model_compiled_in_place_names_detach(pipeline: Any, schedule: Schedule) -> None:
    through_torch(pipeline, schedule, in_place=True)
    hrt.attach(pipeline)
    with pytest.raises(
        HarmonicaError, match=r"[uU]ndo that first: harmonica_rt\.attach\(pipe\.transformer\)\.detach\(\)"
    ):
        hrt.compile(pipeline, schedule)
    hrt.attach(pipeline.transformer).detach()
    expected = sample(hrt.reference(pipeline, schedule), STEPS, **CALL)
    hrt.compile(pipeline, schedule, lowering="plain")
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_attach_to_a_compiled_pipeline_names_uncompile(pipeline: Any, schedule: Schedule, in_place: bool) -> None:
    hrt.compile(pipeline, schedule)
    through_torch(pipeline, schedule, in_place=in_place)
    with pytest.raises(HarmonicaError, match=r"[uU]ndo that first: harmonica_rt\.uncompile\(pipe\)"):
        hrt.attach(pipeline)
    hrt.uncompile(pipeline)
    hrt.attach(pipeline)


def test_tracing_a_compiled_pipeline_is_an_error_that_names_uncompile(pipeline: Any, schedule: Schedule) -> None:
    hrt.compile(pipeline, schedule)
    plain = pipeline.transformer
    through_torch(pipeline, random_schedule(plain, STEPS, seed=1), in_place=False)
    with pytest.raises(
        HarmonicaError, match=r"is compiled twice.*harmonica_rt\.uncompile\(pipe\), or pipe\.transformer"
    ):
        sample(pipeline, STEPS, **CALL)
    pipeline.transformer = plain
    through_torch(pipeline, schedule, in_place=True)
    with pytest.raises(BackendCompilerFailed, match=r"compiled already, .* harmonica_rt\.uncompile\(pipe\)"):
        sample(pipeline, STEPS, **CALL)


def test_tracing_a_compiled_model_is_an_error() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, SITES))
    compiled = hrt.compile(model, schedule, lowering="plain")
    both: Any = torch.compile(compiled, backend="harmonica", options={"schedule": schedule})
    with pytest.raises(HarmonicaError, match="is compiled twice"), torch.no_grad():
        both(**stack_call(0))


def test_other_backends_leave_plans_alone(pipeline: Any, schedule: Schedule) -> None:
    expected = sample(hrt.compile(pipeline, schedule, lowering="plain"), STEPS, **CALL)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    for _ in range(2):
        np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_compiling_twice_takes_the_last_schedule(pipeline: Any, schedule: Schedule) -> None:
    second = random_schedule(pipeline.transformer, STEPS, seed=1)
    expected = sample(hrt.reference(pipeline, second), STEPS, **CALL)
    for each in (schedule, second):
        hrt.compile(pipeline, each, lowering="plain")
    np.testing.assert_array_equal(sample(pipeline, STEPS, **CALL), expected)


def test_attach_and_get_compiled_say_which_of_them_applies(pipeline: Any, schedule: Schedule) -> None:
    compiled = hrt.compile(pipeline.transformer, schedule)
    with pytest.raises(HarmonicaError, match="needs no attach"):
        hrt.attach(compiled)
    hrt.compile(pipeline, schedule)
    with pytest.raises(HarmonicaError, match="needs no attach"):
        hrt.attach(pipeline)
    hrt.reference(pipeline, schedule)
    with pytest.raises(HarmonicaError, match="runs the reference"):
        hrt.get_compiled(pipeline)
    hrt.uncompile(pipeline)
    through_torch(pipeline, schedule, in_place=False)
    with pytest.raises(HarmonicaError, match=r"attach\(pipe\.transformer\)\.report\(\) reports on it"):
        hrt.get_compiled(pipeline)


def test_a_schedule_by_its_path(pipeline: Any) -> None:
    pipeline.transformer = torch.compile(pipeline.transformer, backend="harmonica", options={"schedule": "s.json"})
    with pytest.raises(ArgumentError, match=r"read it first: Schedule\.load\('s\.json'\)"):
        hrt.attach(pipeline)
    with pytest.raises(BackendCompilerFailed, match=r"read it first: Schedule\.load\('s\.json'\)"):
        sample(pipeline, STEPS, **CALL)
