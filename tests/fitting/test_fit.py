"""Fits of models and pipelines: the weights of an oracle of hooks, and better forecasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.fitting.moment_table import FitOptions, MomentTable
from harmonica_rt.indices import SiteIndex, StepIndex
from tests.fitting.small import CALL, STEPS, every, run_of
from tests.models import stack
from tests.tiny import built, shallow, shallow_dit


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return built(shallow_dit)


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
    family = shallow("flux")
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
    assert fitted.weights_by is not None
    assert 0.0 < fitted.weights_by.hyper_parameters["relative_error"] < 1.0


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
