"""The reference, and the comparison of a compiled model with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

from torch import nn

from harmonica_rt.api.subject import held_model, model_to_compile
from harmonica_rt.arguments import (
    check_pipeline_arguments,
    check_schedule,
    check_seed,
    check_tolerance,
    checked_calls,
)
from harmonica_rt.errors import ArgumentError
from harmonica_rt.options import DEFAULT_LOWERING, OTHER_STEPS, CompileOptions, check_choice
from harmonica_rt.parity.lockstep import Tolerance
from harmonica_rt.parity.report import ParityReport
from harmonica_rt.parity.verify import verify_model, verify_pipeline
from harmonica_rt.pipelines.denoiser import PipelineDenoiser
from harmonica_rt.pipelines.fit import check_fit
from harmonica_rt.pipelines.install import install
from harmonica_rt.reference_engine import ReferenceEngine
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.schedule import Schedule, ScheduleSet

P = TypeVar("P")


@overload
def reference(
    model_or_pipeline: nn.Module, schedule: Schedule | ScheduleSet, *, on_other_steps: str = ...
) -> Denoiser: ...


@overload
def reference(model_or_pipeline: P, schedule: Schedule | ScheduleSet, *, on_other_steps: str = ...) -> P: ...


def reference(model_or_pipeline: Any, schedule: Schedule | ScheduleSet, *, on_other_steps: str = "error") -> Any:
    """The plain model, run eagerly with the same schedule by replacing site outputs: the truth for parity.

    Takes and returns what `compile` does (see there for `on_other_steps`), and `uncompile` undoes it in a pipeline.

    Raises:
        ScheduleMismatchError, SiteError, ArgumentError, HarmonicaError: see `compile`.
    """
    check_schedule(schedule)
    check_choice("on_other_steps", on_other_steps, OTHER_STEPS)
    model = model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    engine = ReferenceEngine(model, ScheduleSet.of(schedule).schedules[0])
    denoiser = PipelineDenoiser(held_model(model_or_pipeline), schedule, engine, on_other_steps)
    if isinstance(model_or_pipeline, nn.Module):
        return denoiser
    install(model_or_pipeline, denoiser)
    return model_or_pipeline


def verify(
    model_or_pipeline: Any,
    schedule: Schedule | ScheduleSet,
    *,
    calls: Iterable[Mapping[str, Any]] | None = None,
    lowering: str = DEFAULT_LOWERING,
    graphs: str = "auto",
    seed: int = 0,
    tolerance: Tolerance = "auto",
    on_other_steps: str = "error",
    **pipeline_arguments: Any,
) -> ParityReport:
    """Compare compiled with reference: every step on the reference's inputs, then the result of a free run.

    Args:
        model_or_pipeline: a model (pass `calls`), or a pipeline (pass what it is called with).
        schedule: the schedule to verify, or a set of which the one for the number of steps is verified.
        calls: for a model, the keyword arguments of one call per step.
        lowering: see `compile`.
        graphs: see `compile`; with CUDA graphs, runs are repeated until all graphs have been recorded and replayed.
        seed: for a pipeline, seeds the generator of both runs unless one is passed.
        tolerance: `exact` (equal bit for bit), `measured` (at most twice the error of the eager model in this dtype,
            against a reference one precision up; floor one ulp), or `auto`: exact for `plain` on CPU, else measured.
        on_other_steps: see `compile`; `error`, or `resample` to verify the schedule resampled to the steps of the run.
        pipeline_arguments: arguments of the pipeline's call.

    Raises:
        ParityError: a step or the result is outside the tolerance; names the first step and site that diverge.
        CaptureError: the model cannot be captured.
        ArgumentError: `calls` is missing or does not have one entry per step of a schedule; the pipeline cannot be
            called with these arguments; or as `compile`.
        ScheduleMismatchError: no schedule is for the pipeline's number of steps; or as `compile`.
    """
    check_schedule(schedule)
    options = CompileOptions(lowering=lowering, graphs=graphs, strict=True, max_plans=4, on_other_steps=on_other_steps)
    if on_other_steps == "plain":
        raise ArgumentError("verify compares under a schedule; on_other_steps='plain' leaves nothing to compare")
    check_seed(seed)
    check_tolerance(tolerance)
    model = model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    if not isinstance(model_or_pipeline, nn.Module):
        if calls is not None:
            raise ArgumentError("calls=[...] is for a model by itself; for a pipeline pass what it is called with")
        check_pipeline_arguments(model_or_pipeline, pipeline_arguments)
        return verify_pipeline(
            model_or_pipeline,
            schedule,
            options,
            seed=seed,
            tolerance=tolerance,
            arguments=pipeline_arguments,
        )
    if pipeline_arguments:
        raise ArgumentError(
            f"verify of a model takes no {', '.join(pipeline_arguments)}: its arguments go into calls=[...], one dict "
            "per step"
        )
    inputs = checked_calls(calls, ScheduleSet.of(schedule).steps if on_other_steps == "error" else None)
    return verify_model(model, schedule, inputs, options, tolerance=tolerance)
