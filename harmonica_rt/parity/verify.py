"""Verifies a schedule on a model or a whole pipeline: each step against the reference, and the result of a free run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.engine import Engine
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.options import EXACT, CompileOptions
from harmonica_rt.parity.lockstep import LockstepEngine, Tolerance
from harmonica_rt.parity.report import ParityError, ParityReport, TrajectoryParity
from harmonica_rt.parity.tolerance import NONE, Error, limit_from, same_bits, worst
from harmonica_rt.pipelines.install import denoiser_module
from harmonica_rt.pipelines.one_run import run_once
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.schedule import Schedule, ScheduleSet

RUNS_TO_RECORD = 3  # after the first, which learns the timesteps: to warm up, record and replay graphs


def verify_pipeline(
    pipeline: Any,
    schedule: Schedule | ScheduleSet,
    options: CompileOptions,
    *,
    seed: int,
    tolerance: Tolerance,
    arguments: Mapping[str, Any],
) -> ParityReport:
    """Generate from one seed: in lockstep with the reference, compiled alone, and in the next higher precision alone.

    Raises:
        ParityError: a step or the result is outside the tolerance.
        CaptureError: the model cannot be captured, so there is nothing to verify.
    """
    model = denoiser_module(pipeline)
    lockstep = _lockstep(model, schedule, options, tolerance)
    generators = [leaf for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, torch.Generator)]
    states = [generator.get_state() for generator in generators]

    def generate(engine: Engine) -> Any:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return run_once(pipeline, Denoiser(model, schedule, engine, options.on_other_steps), seed, arguments)

    expected = _checked_runs(lockstep, lambda: generate(lockstep))
    return _finish(lockstep, expected, generate)


def verify_model(
    model: nn.Module,
    schedule: Schedule | ScheduleSet,
    calls: Iterable[Mapping[str, Any]],
    options: CompileOptions,
    *,
    tolerance: Tolerance,
) -> ParityReport:
    """Run one call per step: in lockstep with the reference, compiled alone, and in the next higher precision alone.

    Args:
        model: the denoiser.
        schedule: the schedule, or a set of schedules.
        calls: the keyword arguments of each step's call.
        options: how to compile.
        tolerance: see `harmonica_rt.verify`.

    Raises:
        ScheduleMismatchError: no schedule is for this number of steps.
        ParityError: a step is outside the tolerance.
        CaptureError: the model cannot be captured, so there is nothing to verify.
    """
    inputs = list(calls)
    lockstep = _lockstep(model, schedule, options, tolerance)

    def run(engine: Engine) -> Any:
        denoiser = Denoiser(model, schedule, engine, options.on_other_steps)
        denoiser.reset(steps=len(inputs))
        return _last(denoiser, inputs)

    return _finish(lockstep, _checked_runs(lockstep, lambda: run(lockstep)), run)


def _lockstep(
    model: nn.Module, schedule: Schedule | ScheduleSet, options: CompileOptions, tolerance: Tolerance
) -> LockstepEngine:
    first = ScheduleSet.of(schedule).schedules[0]
    planned = PlannedEngine(model, first, options)
    return LockstepEngine(model, first, planned, tolerance=tolerance, raise_at_once=False)


def _checked_runs(lockstep: LockstepEngine, run: Callable[[], Any]) -> Any:
    """Repeat the lockstep run until a run computes as all later ones will; returns the last result.

    The first run learns the timesteps; with them, the prologue computes for all steps at once, and graphs are recorded.
    """
    result = run()
    if lockstep.planned.cache.pool_bytes is not None:
        more = RUNS_TO_RECORD
    else:
        more = 0 if lockstep.planned.options.lowering in EXACT else 1  # a second run knows the timesteps
    for _ in range(more):
        if lockstep.report.ok:
            result = run()
    return result


def _last(denoiser: Denoiser, inputs: list[Mapping[str, Any]]) -> Any:
    output = None
    for kwargs in inputs:
        output = denoiser(**kwargs)
    return output


def _finish(lockstep: LockstepEngine, expected: Any, run: Callable[[Engine], Any]) -> ParityReport:
    """Judge the result of a free run; `expected` is the reference's result, `run` runs an engine from the beginning."""
    a, b = _arrays(expected), _arrays(run(lockstep.planned))
    report = lockstep.report
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
        report.trajectory = TrajectoryParity(Error(np.inf, np.inf), NONE, same_bits=False, ok=False)
    elif a:
        higher = _arrays(run(lockstep.higher())) if report.tolerance == "measured" and report.ok else None
        report.trajectory = _judged(a, b, higher)
    if not report.ok:
        raise ParityError(report)
    return report


def _judged(
    expected: list[torch.Tensor], got: list[torch.Tensor], higher: list[torch.Tensor] | None
) -> TrajectoryParity:
    """Judge a run's result like a step's, as errors accumulate: by the reference's own error against `higher`."""
    same = all(same_bits(x, y) for x, y in zip(expected, got, strict=True))
    if higher is None:
        differences = [Error.between(y, x) for x, y in zip(expected, got, strict=True)]
        return TrajectoryParity(worst(differences), NONE, same_bits=same, ok=same)
    errors = [Error.between(y, truth) for y, truth in zip(got, higher, strict=True)]
    limits = [limit_from(x, truth) for x, truth in zip(expected, higher, strict=True)]
    ok = all(error.within(limit) for error, limit in zip(errors, limits, strict=True))
    return TrajectoryParity(worst(errors), worst(limits), same_bits=same, ok=ok)


def _arrays(output: Any) -> list[torch.Tensor]:
    """All tensors, arrays and images in a pipeline's output, as tensors."""
    found = []
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, np.ndarray) or hasattr(leaf, "__array_interface__"):
            found.append(torch.from_numpy(np.array(leaf)))
    return found
