"""What the public functions say to arguments that they do not take: what was expected, what came, what to do."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.backend.backend_options import BackendOptions
from harmonica_rt.errors import (
    ArgumentError,
    HarmonicaError,
    PlanFileError,
    ScheduleError,
    ScheduleMismatchError,
    SiteError,
)
from tests.models import SITES, Stack, stack, stack_call
from tests.tiny import dit

STEPS = 4
CALL = {"class_labels": [1, 2], "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A tiny pipeline for all tests that leave it unchanged."""
    torch.manual_seed(0)
    built = dit()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def schedule(pipeline: Any) -> hrt.Schedule:
    return hrt.Schedule.every(2, steps=STEPS, sites=hrt.find_sites(pipeline.transformer))


@pytest.fixture
def model() -> Stack:
    return stack()


@pytest.fixture
def compiled(model: Stack) -> hrt.CompiledModel:
    return hrt.compile(model, hrt.Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, SITES)), lowering="plain")


NO_SCHEDULES: dict[str, tuple[Any, str]] = {
    "path": ("made/s.json", r"got 'made/s\.json'; read it first: Schedule\.load\('made/s\.json'\)"),
    "Path": (Path("s.json"), r"read it first: Schedule\.load\('s\.json'\)"),
    "dict": ({"steps": 4}, r"got a dict; one schedule at a time"),
    "mask": (np.ones((4, 4), bool), r"Schedule\.from_array\(mask, sites\) makes one"),
    "tensor": (torch.ones(4, 4), r"Schedule\.from_array\(mask, sites\) makes one"),
    "nothing": (None, r"got None; Schedule\.load\(path\) reads one"),
    "class": (hrt.Schedule, r"got the class Schedule itself; create one, as with"),
    "list": ([1, 0], r"got a list; Schedule\.load\(path\) reads one"),
    "result": (SimpleNamespace(schedule=hrt.Schedule.all_compute(steps=2, sites=["a"])), r"pass its `\.schedule`"),
    "model": (stack(), r"got a Stack; the model or pipeline comes first, the schedule second"),
}
TAKE_A_SCHEDULE: dict[str, Callable[[Any, Any], Any]] = {
    "compile": hrt.compile,
    "compile-model": lambda pipe, given: hrt.compile(pipe.transformer, given),
    "reference": hrt.reference,
    "verify": lambda pipe, given: hrt.verify(pipe, given, **CALL),
    "backend": lambda pipe, given: BackendOptions.of({"schedule": given}),
}


@pytest.mark.parametrize("given", NO_SCHEDULES)
@pytest.mark.parametrize("function", TAKE_A_SCHEDULE)
def test_what_is_no_schedule(pipeline: Any, function: str, given: str) -> None:
    value, message = NO_SCHEDULES[given]
    with pytest.raises(ArgumentError, match=rf"expected a harmonica_rt\.Schedule, .*{message}"):
        TAKE_A_SCHEDULE[function](pipeline, value)
    assert type(pipeline.scheduler) is d.DDIMScheduler


NO_SUBJECTS: dict[str, tuple[Any, str]] = {
    "pipeline-class": (d.DiTPipeline, r"the class DiTPipeline itself; create an object"),
    "model-class": (Stack, r"the class Stack itself; create an object"),
    "hub-id": (
        "facebook/DiT-XL-2-256",
        r"load it first: DiffusionPipeline\.from_pretrained\('facebook/DiT-XL-2-256'\)",
    ),
    "list": ([stack()], r"got a list; pass one model or pipeline at a time"),
    "components": ({"transformer": stack()}, r"got a dict; pass one model or pipeline at a time"),
    "nothing": (None, r"got None"),
    "function": (len, r"got a builtin_function_or_method"),
    "without scheduler": (SimpleNamespace(transformer=stack(), scheduler=None), r"its scheduler is None"),
}
TAKE_A_SUBJECT: dict[str, Callable[[Any, Any], Any]] = {
    "compile": hrt.compile,
    "reference": hrt.reference,
    "verify": hrt.verify,
    "uncompile": lambda given, schedule: hrt.uncompile(given),
    "get_compiled": lambda given, schedule: hrt.get_compiled(given),
    "attach": lambda given, schedule: hrt.attach(given),
    "load": lambda given, schedule: hrt.load("plan.json", given),
}


@pytest.mark.parametrize("given", NO_SUBJECTS)
@pytest.mark.parametrize("function", TAKE_A_SUBJECT)
def test_what_is_neither_model_nor_pipeline(schedule: hrt.Schedule, function: str, given: str) -> None:
    value, message = NO_SUBJECTS[given]
    with pytest.raises(ArgumentError, match=rf"expected an nn\.Module or a diffusers pipeline, .*{message}"):
        TAKE_A_SUBJECT[function](value, schedule)


def test_an_object_that_cannot_be_followed() -> None:
    given = SimpleNamespace(transformer=stack(), scheduler=d.DDIMScheduler())
    with pytest.raises(ArgumentError, match=r"a SimpleNamespace allows no weak references .* a class of your own"):
        hrt.compile(given, hrt.Schedule.every(2, steps=4, sites=hrt.find_sites(given.transformer, patterns=SITES)))


def test_verify_names_a_misspelt_argument(pipeline: Any, schedule: hrt.Schedule) -> None:
    with pytest.raises(ArgumentError, match="DiTPipeline takes no class_label; it takes class_labels"):
        hrt.verify(pipeline, schedule, class_label=[1], num_inference_steps=4)


@pytest.mark.parametrize("function", ["compile", "reference", "verify"])
def test_swapped_arguments(pipeline: Any, schedule: hrt.Schedule, function: str) -> None:
    with pytest.raises(ArgumentError, match="the model or pipeline comes first, the schedule second"):
        getattr(hrt, function)(schedule, pipeline)


@pytest.mark.parametrize("function", [hrt.uncompile, hrt.get_compiled])
def test_a_model_where_a_pipeline_is_expected(compiled: hrt.CompiledModel, function: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentError, match="expected a pipeline, got a Stack"):
        function(compiled.model)
    with pytest.raises(ArgumentError, match="a compiled model without a pipeline"):
        function(compiled)


BAD_OPTIONS: dict[str, tuple[str, Any, str]] = {
    f"{name}={value!r}": (name, value, message)
    for name, values, message in (
        ("max_plans", (2.5, True, "8", None), "max_plans must be a whole number, got"),
        ("max_plans", (0, -1), "max_plans must be a whole number of at least 1, got"),
        ("strict", ("no", 1, None), "strict must be True or False, got"),
        ("debug", ("on", 0, []), "debug must be True or False, got"),
        ("verify", ("step", 1), "verify must be True or False, got"),
        ("lowering", ("cuda", None, True, ["plain"]), "is not known; choose one of plain, fused, inductor"),
        ("graphs", (True, None, "yes", 0), "is not known; choose one of auto, on, off"),
    )
    for value in values
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_options_of_the_wrong_kind(pipeline: Any, schedule: hrt.Schedule, option: str) -> None:
    name, value, message = BAD_OPTIONS[option]
    with pytest.raises(HarmonicaError, match=message):
        hrt.compile(pipeline, schedule, **{name: value})
    if name in ("max_plans", "strict", "graphs"):
        with pytest.raises(HarmonicaError, match=message):
            hrt.load("plan.json", pipeline, **{name: value})
    if name in ("debug", "lowering", "graphs"):
        with pytest.raises(HarmonicaError, match=message):
            BackendOptions.of({"schedule": schedule, name: value})
    assert type(pipeline.scheduler) is d.DDIMScheduler


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"needs a harmonica_rt\.Schedule: torch\.compile\("),
        ({}, r"needs a harmonica_rt\.Schedule: torch\.compile\("),
        ("s.json", r"takes its options as a dict, got 's\.json'"),
        ([1], r"takes its options as a dict, got a list"),
        (
            {"strict": True},
            r"has no option 'strict'; it has schedule, lowering, graphs, max_plans, max_plan_bytes, debug",
        ),
    ],
    ids=["none", "empty", "path", "list", "unknown"],
)
def test_options_of_the_backend(given: Any, message: str) -> None:
    with pytest.raises(HarmonicaError, match=message):
        BackendOptions.of(given)


@pytest.mark.parametrize("count", [0, STEPS - 1, STEPS + 1])
def test_verify_takes_one_call_per_step(compiled: hrt.CompiledModel, count: int) -> None:
    with pytest.raises(ArgumentError, match=f"calls holds {count} calls, the schedule has 4 steps"):
        hrt.verify(compiled.model, compiled.schedule, calls=[stack_call(step) for step in range(count)])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (None, r"needs calls"),
        (stack_call(0), r"got a dict"),
        (4, r"got 4"),
        ("abcd", r"got 'abcd'"),
        ([1, 2, 3, 4], r"call 0 is 1"),
        ([stack_call(0), [1], stack_call(2), stack_call(3)], r"call 1 is a list"),
        ([{3: 1}] * 4, r"call 0 is a dict"),
    ],
    ids=["none", "one-dict", "number", "text", "numbers", "one-list", "keys"],
)
def test_verify_takes_calls_as_dicts(compiled: hrt.CompiledModel, calls: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        hrt.verify(compiled.model, compiled.schedule, calls=calls)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"DiTPipeline cannot be called like this: missing a required argument: 'class_labels'"),
        ({**CALL, "prompt": "a cat"}, r"DiTPipeline takes no prompt"),
        ({**CALL, "calls": []}, r"calls=\[\.\.\.\] is for a model by itself"),
        ({**CALL, "seed": "x"}, r"seed must be a whole number, got 'x'"),
        ({**CALL, "seed": 1.5}, r"seed must be a whole number, got 1\.5"),
        ({**CALL, "tolerance": 1e-3}, r"tolerance must be one of auto, exact, measured, got 0\.001"),
        ({**CALL, "lowering": "best"}, r"lowering 'best' is not known"),
    ],
    ids=["none", "unknown", "calls", "seed-text", "seed-float", "tolerance", "lowering"],
)
def test_verify_of_a_pipeline(pipeline: Any, schedule: hrt.Schedule, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        hrt.verify(pipeline, schedule, **arguments)
    assert type(pipeline.scheduler) is d.DDIMScheduler


def test_verify_of_a_model_takes_no_pipeline_arguments(compiled: hrt.CompiledModel) -> None:
    with pytest.raises(ArgumentError, match="takes no class_labels, height: its arguments go into calls"):
        hrt.verify(compiled.model, compiled.schedule, class_labels=[1], height=8)


def test_another_number_of_steps_names_both_remedies(schedule: hrt.Schedule) -> None:
    compiled = hrt.compile(dit(), schedule)
    compiled.set_progress_bar_config(disable=True)
    with pytest.raises(ScheduleMismatchError, match=r"Use a schedule for 6, or pass num_inference_steps so that"):
        compiled([1], num_inference_steps=6)


# ---- files


def test_save_names_what_cannot_be_written(compiled: hrt.CompiledModel, tmp_path: Path) -> None:
    with torch.no_grad():
        compiled(**stack_call(0))
    for path in (tmp_path, tmp_path / "no" / "plan.json"):
        with pytest.raises(PlanFileError, match=f"{path}: cannot be written"):
            compiled.save(path)
    for given in (None, 3, "", b"plan.json", compiled.schedule):
        with pytest.raises(ArgumentError, match="expected the path of a file"):
            compiled.save(given)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_load_names_what_cannot_be_read(compiled: hrt.CompiledModel, tmp_path: Path) -> None:
    schedule, pickled = tmp_path / "schedule.json", tmp_path / "plan.pkl"
    compiled.schedule.save(schedule)
    pickled.write_bytes(pickle.dumps({"a": 1}))
    for path in (tmp_path, tmp_path / "no", schedule, pickled):
        with pytest.raises(PlanFileError, match=str(path)):
            hrt.load(path, compiled.model)
    with pytest.raises(ArgumentError, match="the path comes first, the model or pipeline second"):
        hrt.load(compiled.model, schedule)  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match=r"a schedule goes to compile\(model_or_pipeline, schedule\)"):
        hrt.load(compiled.schedule, compiled.model)  # type: ignore[call-overload]


# ---- sites and records


@pytest.mark.parametrize("function", [hrt.find_sites, hrt.model_info])
def test_what_is_no_module(pipeline: Any, function: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"takes an nn\.Module, .*: {function.__name__}\(pipe\.transformer\)"):
        function(pipeline)
    for given in ([], None, "blocks"):
        with pytest.raises(ArgumentError, match=r"takes an nn\.Module, got an object of class"):
            function(given)


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ("blocks.*.mlp", SiteError, r"patterns is a list of globs, not one string"),
        (3, ArgumentError, r"patterns is a list of globs"),
        ([3], ArgumentError, r"patterns is a list of globs"),
        ([], SiteError, r"patterns is empty"),
        ([r"blocks\.\d+\.mlp"], SiteError, r"matches no module of Stack: `\*` stands for"),
    ],
    ids=["text", "number", "numbers", "empty", "regex"],
)
def test_patterns(model: Stack, patterns: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hrt.find_sites(model, patterns)


def test_sites_in_no_order_are_refused(model: Stack) -> None:
    with pytest.raises(ScheduleError, match="got a set, which has no order"):
        hrt.Schedule.every(2, steps=STEPS, sites=set(hrt.find_sites(model, SITES)))


def test_sites_and_records_are_of_the_model_inside(pipeline: Any, schedule: hrt.Schedule) -> None:
    plain = pipeline.transformer
    for wrapped in (torch.compile(plain, backend="eager"), hrt.compile(plain, schedule)):
        assert hrt.find_sites(wrapped) == hrt.find_sites(plain)
        assert hrt.model_info(wrapped) == hrt.model_info(plain)


# ---- a compiled model


@pytest.mark.parametrize(
    "given",
    [
        [4.0, 3.0, 2.0, 1.0],
        (4, 3, 2, 1),
        range(4),
        torch.arange(4),
        torch.arange(4.0),
        np.arange(4),
        iter([4, 3, 2, 1]),
    ],
    ids=["list", "tuple", "range", "ints", "floats", "array", "iterator"],
)
def test_reset_takes_timesteps_of_any_kind(compiled: hrt.CompiledModel, given: Any) -> None:
    compiled.reset(given)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([1.0, 2.0], ScheduleMismatchError),
        ([], ScheduleMismatchError),
        ("abcd", ArgumentError),
        (4, ArgumentError),
        (torch.tensor(3.0), ArgumentError),
        (torch.ones(2, 2), ArgumentError),
        (torch.ones(4, device="meta"), ArgumentError),
        ([float("nan")] * 4, ArgumentError),
        ([None] * 4, ArgumentError),
    ],
    ids=["few", "none", "text", "number", "scalar", "matrix", "meta", "nan", "nones"],
)
def test_reset_refuses_other_timesteps(compiled: hrt.CompiledModel, given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timesteps"):
        compiled.reset(given)


def test_a_report_before_the_first_run(compiled: hrt.CompiledModel) -> None:
    assert "no plan yet: the first call makes one" in str(compiled.report())


def test_a_compiled_model_can_be_compiled_again(compiled: hrt.CompiledModel) -> None:
    other = hrt.Schedule.all_compute(steps=2, sites=compiled.schedule.sites)
    again = hrt.compile(compiled, other, lowering="plain")
    assert again.model is compiled.model
    assert (again.schedule, compiled.schedule.steps) == (other, STEPS)


def test_what_is_fixed_cannot_be_set(compiled: hrt.CompiledModel) -> None:
    other = hrt.Schedule.all_compute(steps=2, sites=compiled.schedule.sites)
    with pytest.raises(HarmonicaError, match="the schedule of a compiled model is fixed; compile the model"):
        compiled.schedule = other


def test_attributes_that_are_set_are_the_models(compiled: hrt.CompiledModel) -> None:
    compiled.gain = 2.0
    assert compiled.model.gain == 2.0
    del compiled.gain
    assert not hasattr(compiled.model, "gain")
