"""Fits the weights of a schedule to calls of a model or a pipeline."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.fitting.fitting_engine import FittingEngine
from harmonica_rt.fitting.moment_table import FitOptions, MomentTable
from harmonica_rt.pipelines.fit import model_info
from harmonica_rt.pipelines.install import denoiser_module
from harmonica_rt.pipelines.one_run import run_once
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.schedule import SamplerInfo, Schedule, WeightsBy

log = logging.getLogger(__name__)

METHOD = "least-squares"


def fit_pipeline(
    pipeline: Any, schedule: Schedule, calls: Sequence[Mapping[str, Any]], options: FitOptions, seed: int
) -> Schedule:
    """The schedule with weights fitted to calls of a pipeline; call k is seeded with `seed + k`."""
    model = denoiser_module(pipeline)

    def run(new_denoiser: Callable[[], Denoiser]) -> None:
        for number, call in enumerate(calls):
            run_once(pipeline, new_denoiser(), seed + number, call)

    fitted = _fitted(model, schedule, options, len(calls), run)
    return fitted if fitted.sampler else dataclasses.replace(fitted, sampler=SamplerInfo.of(pipeline.scheduler))


def fit_model(
    model: nn.Module, schedule: Schedule, calls: Sequence[Mapping[str, Any]], options: FitOptions
) -> Schedule:
    """The schedule with weights fitted to runs of a model; each run is one call per step of `calls`."""
    runs = [calls[start : start + schedule.steps] for start in range(0, len(calls), schedule.steps)]

    def run(new_denoiser: Callable[[], Denoiser]) -> None:
        for steps in runs:
            denoiser = new_denoiser()
            for call in steps:
                denoiser(**call)

    return _fitted(model, schedule, options, len(runs), run)


def _fitted(
    model: nn.Module,
    schedule: Schedule,
    options: FitOptions,
    runs: int,
    run: Callable[[Callable[[], Denoiser]], None],
) -> Schedule:
    table = MomentTable(schedule, options)
    taking_all = _taking_all(schedule, table)
    engine = FittingEngine(model, taking_all, table)
    run(lambda: Denoiser(model, taking_all, engine))
    entries = int((~schedule.compute).sum())
    if not table.seen:
        raise HarmonicaError(
            f"the calls reached none of the {entries} reused entries of the schedule, so there is nothing to fit to. "
            f"A run begins with step 0 and has {schedule.steps} steps"
        )
    if table.seen < entries:
        unseen = entries - table.seen
        log.warning("%d of %d reused entries were reached by no call and keep their weights", unseen, entries)
    by = WeightsBy(
        METHOD,
        {
            **dataclasses.asdict(options),
            "calls": runs,
            "samples": engine.samples,
            "relative_error": float(f"{table.relative_error():.4g}"),
        },
    )
    fitted = schedule.with_weights(table.all_weights(schedule.entry_weights), by=by)
    return fitted if fitted.model else dataclasses.replace(fitted, model=model_info(model))


def _taking_all(schedule: Schedule, table: MomentTable) -> Schedule:
    """The schedule with some weight other than that of plain reuse for every value that an entry is to take."""
    taken = np.arange(table.values.max())
    return schedule.with_weights(np.where(taken < table.values[:, :, None], 0.5, 0.0))
