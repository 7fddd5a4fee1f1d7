"""Fits of models and pipelines: the weights of an oracle of hooks, better forecasts, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.errors import ArgumentError, HarmonicaError, ScheduleMismatchError
from harmonica_rt.fitting.moment_table import FitOptions, MomentTable
from harmonica_rt.indices import SiteIndex, StepIndex
from harmonica_rt.pipelines.install import installed
from harmonica_rt.sampling.scheduler import listener_of
from tests.models import stack, stack_call
from tests.sampling.interruptions import interruptions, state
from tests.tiny import built, families, shallow_dit

STEPS = 5
CALL = {"num_inference_steps": STEPS, **families()["dit"].guided}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return built(shallow_dit)


def every(k: int, model: nn.Module) -> Schedule:
    return Schedule.every(k, steps=STEPS, sites=find_sites(model))


def run_of(seed: int) -> list[dict[str, torch.Tensor]]:
    """The calls of a run: latents that move by a fifth of a random vector per step."""
    generator = torch.Generator().manual_seed(seed)
    start, direction = torch.randn(2, 2, 4, 8, generator=generator)
    return [{**stack_call(step), "latents": start + 0.2 * step * direction} for step in range(STEPS)]


def outputs_of(model: nn.Module, call: dict[str, Any], given: dict[str, torch.Tensor], sites: Any) -> dict[str, Any]:
    """The output of each site in one forward, some of them replaced, by forward hooks."""
    found: dict[str, Any] = {}

    def hook(site: str) -> Callable[..., Any]:
        def ran(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            found[site] = given.get(site, output).clone()
            return found[site]

        return ran

    handles = [model.get_submodule(site).register_forward_hook(hook(site)) for site in sites]
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    return found


def oracle(model: nn.Module, schedule: Schedule, runs: list[list[dict[str, Any]]], order: int) -> dict[int, Any]:
    """The weights of each step that reuses all sites, from all runs, each run in closed loop."""
    seen: dict[int, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}
    weights: dict[int, np.ndarray[Any, Any]] = {}
    for calls in runs:
        history: dict[str, list[torch.Tensor]] = {site: [] for site in schedule.sites}
        for step, call in enumerate(calls):
            given = {}
            if not schedule.compute[step].any():
                truth = outputs_of(model, call, {}, schedule.sites)
                latest = {site: own[:order] for site, own in history.items()}
                columns = [torch.stack(own, -1).double().flatten(0, -2) for own in latest.values()]
                target = torch.cat([truth[site].double().flatten() for site in latest])
                seen.setdefault(step, []).append((torch.cat(columns).numpy(), target.numpy()))
                stacked = [np.concatenate(parts) for parts in zip(*seen[step], strict=True)]
                weights[step] = np.linalg.lstsq(stacked[0], stacked[1], rcond=None)[0]
                given = {
                    site: sum(w * v.double() for w, v in zip(weights[step], own, strict=True)).float()
                    for site, own in latest.items()
                }
            values = outputs_of(model, call, given, schedule.sites)
            if not given:
                history = {site: [values[site], *own] for site, own in history.items()}
    return weights


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_weights_are_those_of_an_oracle_of_hooks(order: int) -> None:
    model = stack()
    schedule = every(2, model)
    runs = [run_of(0), run_of(1)]
    fitted = hrt.fit(model, schedule, [call for run in runs for call in run], order=order)
    for step, weights in oracle(model, schedule, runs, order).items():
        assert fitted.entry_weights[step, 0, : len(weights)] == pytest.approx(weights, abs=2e-3)
    assert fitted.weights is not None
    assert fitted.weights.ndim == 2  # shared
    assert np.array_equal(fitted.compute, schedule.compute)


def test_entries_of_a_site_have_their_own_weights_if_asked() -> None:
    model = stack()
    shared, own = (hrt.fit(model, every(2, model), run_of(0), per_site=per_site) for per_site in (False, True))
    assert own.weights is not None
    assert own.weights.ndim == 3
    errors = [fitted.weights_by.hyper_parameters["relative_error"] for fitted in (shared, own)]
    assert errors[1] < errors[0] < 1.0


def test_sites_with_short_histories_have_as_many_weights_as_values() -> None:
    model = stack()
    compute = np.array([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6, [1, 0, 1, 0, 1, 0], [0] * 6], dtype=bool)
    schedule = Schedule.from_array(compute, find_sites(model))
    fitted = hrt.fit(model, schedule, run_of(0), order=3)
    used = (fitted.entry_weights != 0.0).sum(axis=2)
    before = np.cumsum(compute, axis=0) - compute
    assert np.array_equal(used, np.where(compute, 0, np.minimum(before, 3)))


def test_forecasts_of_other_runs_are_better_than_reuse(pipeline: Any) -> None:
    schedule = every(2, pipeline.transformer)
    fitted = hrt.fit(pipeline, schedule, [CALL, CALL], seed=5)

    def run(under: Schedule | None) -> np.ndarray[Any, Any]:
        if under is not None:
            hrt.reference(pipeline, under)
        try:
            return np.array(pipeline(**CALL, generator=torch.Generator().manual_seed(1), output_type="np").images)
        finally:
            if under is not None:
                hrt.uncompile(pipeline)

    true = run(None)
    assert np.square(run(fitted) - true).sum() < np.square(run(schedule) - true).sum()


def test_the_schedule_says_how_its_weights_were_made(pipeline: Any) -> None:
    fitted = hrt.fit(pipeline, every(2, pipeline.transformer), [CALL, CALL], order=3)
    assert fitted.weights_by is not None
    settings = fitted.weights_by.hyper_parameters
    assert fitted.weights_by.method == "least-squares"
    labels = len(CALL["class_labels"])
    assert {name: settings[name] for name in ("order", "per_site", "calls", "samples")} == {
        **{"order": 3, "per_site": False, "calls": 2},
        "samples": 2 * 2 * labels,  # calls, halves of guidance
    }
    assert 0.0 < settings["relative_error"] < 1.0
    assert fitted.model == hrt.model_info(pipeline.transformer)
    assert fitted.sampler is not None
    assert fitted.sampler.class_name == type(pipeline.scheduler).__name__


def test_the_same_calls_give_the_same_weights_and_other_seeds_others(pipeline: Any) -> None:
    schedule = every(2, pipeline.transformer)
    one, two, other = (hrt.fit(pipeline, schedule, [CALL], seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one != other


def test_a_pipeline_that_calls_twice_per_step_is_fitted_to_both_calls() -> None:
    family = families()["flux"]
    pipeline = built(family.build)
    call = {"num_inference_steps": 4, **family.guided}
    schedule = Schedule.every(2, steps=4, sites=find_sites(pipeline.transformer))
    fitted = hrt.fit(pipeline, schedule, [call])
    assert fitted.weights_by is not None
    assert fitted.weights_by.hyper_parameters["relative_error"] < 1.0


@pytest.mark.parametrize("level", ["span", "output"])
def test_other_levels_of_sites(pipeline: Any, level: str) -> None:
    sites = find_sites(pipeline.transformer, level=level)
    fitted = hrt.fit(pipeline, Schedule.every(2, steps=STEPS, sites=sites), [CALL])
    assert fitted.most_weights == 2
    report = hrt.verify(pipeline, fitted, lowering="plain", **CALL)
    assert report.ok


def test_a_compiled_pipeline_is_left_compiled(pipeline: Any) -> None:
    schedule = every(2, pipeline.transformer)
    hrt.compile(pipeline, schedule)
    compiled = installed(pipeline.transformer)
    try:
        fitted = hrt.fit(pipeline, schedule, [CALL])
        assert installed(pipeline.transformer) is compiled
        assert listener_of(pipeline.scheduler) is compiled
    finally:
        hrt.uncompile(pipeline)
    assert fitted == hrt.fit(pipeline, schedule, [CALL])


def test_random_numbers_of_others_are_left_alone(pipeline: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    hrt.fit(pipeline, every(2, pipeline.transformer), [CALL])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_run_leaves_the_pipeline_as_it_was(pipeline: Any) -> None:
    before = state(pipeline.transformer)
    with pytest.raises(ScheduleMismatchError, match="5"):
        hrt.fit(pipeline, every(2, pipeline.transformer), [CALL, {**CALL, "num_inference_steps": 4}])
    assert state(pipeline.transformer) == before
    assert listener_of(pipeline.scheduler) is None


def test_an_interrupted_fit_leaves_the_model_as_it_was() -> None:
    model = stack(depth=1)
    before, schedule = state(model), every(2, model)
    tried = 0
    for interrupted in interruptions(lambda: hrt.fit(model, schedule, run_of(0)), most=6):
        tried += bool(interrupted)
        assert state(model) == before
    assert tried


def test_entries_that_no_call_has_reached_keep_their_weights() -> None:
    model = stack()
    schedule = every(2, model).with_taylor()
    table = MomentTable(schedule, FitOptions(order=2, per_site=False))
    step, sites = StepIndex(3), len(schedule.sites)
    values = [[torch.randn(9)], [torch.randn(9)]]
    table.learn(step, SiteIndex(0), [2 * values[0][0] + values[1][0]], values)
    assert table.seen == 1
    weights = table.all_weights(schedule.entry_weights)
    assert weights[3, 0] == pytest.approx([2, 1], abs=1e-3)
    rest = np.ones((STEPS, sites), dtype=bool)
    rest[3, 0] = False
    assert np.array_equal(weights[rest], schedule.entry_weights[rest])


def test_values_that_are_not_finite_are_refused() -> None:
    model = stack()
    with torch.no_grad():
        model.blocks[1].attn.weight.fill_(float("inf"))
    with pytest.raises(HarmonicaError, match=r"blocks\.\d\.\w+ returns NaN or infinity at step 1"):
        hrt.fit(model, every(2, model), run_of(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order must be a whole number of at least 1"),
        ({"order": 5}, "order must be at most 4"),
        ({"order": 2.0}, "order must be a whole number"),
        ({"per_site": "no"}, "per_site must be True or False"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"calls": []}, "holds 0 calls"),
        ({"calls": run_of(0)[:3]}, "holds 3 calls, the schedule has 5 steps"),
        ({"calls": {"latents": 1}}, "as dicts; got"),
        ({"calls": [1]}, "call 0 is"),
        ({"schedule": Schedule.all_compute(steps=STEPS, sites=find_sites(stack()))}, "reuses nothing"),
        ({"schedule": "every.json"}, "read it first"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    model = stack()
    given = {"schedule": every(2, model), "calls": run_of(0), **change}
    with pytest.raises(ArgumentError, match=message):
        hrt.fit(model, given.pop("schedule"), given.pop("calls"), **given)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "calls is empty"),
        ([{"klass": 1}], "fit calls the pipeline, and DiTPipeline takes no klass"),
        ([{}], "cannot be called"),
    ],
)
def test_wrong_calls_of_a_pipeline_are_refused(pipeline: Any, calls: list[Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        hrt.fit(pipeline, every(2, pipeline.transformer), calls)
