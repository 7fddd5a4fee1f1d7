"""Compiles models and pipelines, from a schedule or from a saved plan."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any, TypeVar, Unpack, overload

from torch import nn

from harmonica_rt.api.compiled_model import CompiledModel
from harmonica_rt.api.subject import held_model, model_to_compile
from harmonica_rt.arguments import check_path, check_schedule
from harmonica_rt.errors import HarmonicaError, InvariantError, PlanFileError
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.options import (
    DEFAULT_LOWERING,
    OTHER_STEPS,
    CompileKeywords,
    CompileOptions,
    LoadKeywords,
    check_choice,
    check_flags,
)
from harmonica_rt.pipelines.fit import check_fit, warn_about_sampler
from harmonica_rt.pipelines.install import (
    install,
    other_denoisers,
)
from harmonica_rt.planfile import file as plan_file
from harmonica_rt.schedule import Schedule, ScheduleSet

log = logging.getLogger(__name__)

P = TypeVar("P")


@overload
def compile(
    model_or_pipeline: nn.Module,
    schedule: Schedule | ScheduleSet,
    *,
    verify: bool = ...,
    **options: Unpack[CompileKeywords],
) -> CompiledModel: ...


@overload
def compile(
    model_or_pipeline: P,
    schedule: Schedule | ScheduleSet,
    *,
    verify: bool = ...,
    **options: Unpack[CompileKeywords],
) -> P: ...


def compile(
    model_or_pipeline: Any,
    schedule: Schedule | ScheduleSet,
    *,
    lowering: str = DEFAULT_LOWERING,
    graphs: str = "auto",
    verify: bool = False,
    strict: bool = False,
    max_plans: int = 8,
    max_plan_bytes: int | None = None,
    debug: bool = False,
    on_other_steps: str = "error",
) -> Any:
    """Compile a model, or the denoiser of a pipeline, with a schedule.

    For a pipeline, the denoiser is compiled in place and the same pipeline is returned; its scheduler begins the runs
    and counts the steps. For a model, a `CompiledModel` is returned, which is called like the model, once per step;
    `reset()` must be called to begin the next run, or the next image would continue where the last one stopped.
    Assigning it to a pipeline (`pipe.transformer = compile(pipe.transformer, schedule)`) compiles the pipeline. Plans
    are made at the first call of each signature (shapes, dtypes, plain arguments). For inference only: results carry
    no gradient.

    Args:
        model_or_pipeline: an `nn.Module` in eval mode, or a diffusers pipeline.
        schedule: which sites to compute and which to reuse in each step; or a `ScheduleSet`, of which each run takes
            the schedule for its number of steps.
        lowering: `fused` uses fused ops and computes everything that does not depend on the latents before the steps;
            it equals the reference up to rounding. `inductor` also compiles what lies between the fused ops, each
            unique region once, in seconds to minutes. `plain` runs operator by operator; on CPU it equals the reference
            bit for bit.
        graphs: on a CUDA device, `auto` records each step program as a CUDA graph and keeps it unless it is slower
            than plain launches, `on` keeps every one, `off` records none. Elsewhere there are no graphs.
        verify: run the reference alongside and raise ParityError at the first step that differs. Costs the time of
            both; meant for trying a schedule out.
        strict: raise CaptureError where the model cannot be captured, instead of running eagerly with a warning.
        max_plans: number of plans kept at once, at least 1; the least recently used one is dropped.
        max_plan_bytes: bytes of device memory that all plans may hold (cached features, inputs of CUDA graphs, and
            memory that graphs reserved); by default a quarter of a GPU's memory, and no limit on a CPU. The least
            recently used plans are dropped; those of the current run stay, however large they are.
        debug: fill slots with NaN before they are written and after their last read.
        on_other_steps: what becomes of a run with a number of steps (NFE) that no schedule is for. `error`:
            ScheduleMismatchError. `resample`: the schedule, or the nearest of a set, is resampled
            (`Schedule.resample`), and planned without a new capture. `plain`: the run is uncached. A model by itself
            knows the number of steps of a run only if `reset` is given them or their timesteps.

    Raises:
        ScheduleMismatchError: the schedule was made for another model.
        SiteError: the model lacks a site, or one site lies inside another.
        ArgumentError: an argument is not the model, pipeline or schedule that is expected, or an option has the wrong
            type or an unknown value.
        HarmonicaError: the pipeline has no known denoiser, or its denoiser is already compiled by torch.compile with
            this package's backend.
    """
    check_flags(verify=verify, debug=debug)
    if verify and debug:
        raise HarmonicaError("verify reads slots after their last use, which debug overwrites; choose one of the two")
    options = CompileOptions(
        lowering=lowering,
        graphs=graphs,
        strict=strict,
        max_plans=max_plans,
        max_plan_bytes=max_plan_bytes,
        debug=debug,
        on_other_steps=on_other_steps,
    )
    planned = _planned(model_or_pipeline, schedule, options)
    return _take_over(model_or_pipeline, CompiledModel(held_model(model_or_pipeline), schedule, planned, verify=verify))


@overload
def load(
    path: str | os.PathLike[str],
    model_or_pipeline: nn.Module,
    **options: Unpack[LoadKeywords],
) -> CompiledModel: ...


@overload
def load(
    path: str | os.PathLike[str],
    model_or_pipeline: P,
    **options: Unpack[LoadKeywords],
) -> P: ...


def load(
    path: str | os.PathLike[str],
    model_or_pipeline: Any,
    *,
    graphs: str = "auto",
    strict: bool = False,
    max_plans: int = 8,
    max_plan_bytes: int | None = None,
    on_other_steps: str | None = None,
) -> Any:
    """Compile a model or pipeline with the schedules, lowering and plans of a file that `CompiledModel.save` wrote.

    A call whose signature was saved is not captured or planned again; other signatures get their plans as usual.

    Args:
        path: a file that `CompiledModel.save` wrote.
        model_or_pipeline: the same model in the same state (the values of its parameters may differ), or a pipeline
            with it.
        graphs, strict, max_plans, max_plan_bytes: see `compile`.
        on_other_steps: see `compile`; None: as the saved model was compiled.

    Raises:
        PlanFileError: the file is missing, damaged, or made for another model, torch or version.
        CaptureError: the model is in training mode, or has hooks inside.
        RegionError: Inductor cannot compile a region.
        ArgumentError, HarmonicaError: see `compile`.
    """
    check_path(path)
    options = CompileOptions(graphs=graphs, strict=strict, max_plans=max_plans, max_plan_bytes=max_plan_bytes)
    if on_other_steps is not None:
        check_choice("on_other_steps", on_other_steps, OTHER_STEPS)
    model = model_to_compile(model_or_pipeline)
    try:
        found = plan_file.read(path, model)
    except OSError as error:
        raise PlanFileError(f"{os.fspath(path)}: cannot be read as a saved plan ({error.strerror})") from error
    options = dataclasses.replace(
        options,
        lowering=found.lowering,
        max_plans=max(max_plans, len(found.plans)),
        on_other_steps=found.on_other_steps if on_other_steps is None else on_other_steps,
    )
    planned = _planned(model_or_pipeline, found.schedule, options)
    try:
        planned.restore(found.plans, ScheduleSet.of(found.schedule))
    except (PlanFileError, InvariantError) as error:
        raise PlanFileError(f"{os.fspath(path)}: {error}; compile the model and save it again") from error
    return _take_over(
        model_or_pipeline, CompiledModel(held_model(model_or_pipeline), found.schedule, planned, verify=False)
    )


def _planned(model_or_pipeline: Any, schedule: Schedule | ScheduleSet, options: CompileOptions) -> PlannedEngine:
    check_schedule(schedule)
    model = model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    return PlannedEngine(model, ScheduleSet.of(schedule).schedules[0], options)


def _take_over(model_or_pipeline: Any, compiled: CompiledModel) -> Any:
    """Return the compiled model, or install it in the given pipeline and return the pipeline."""
    if isinstance(model_or_pipeline, nn.Module):
        return compiled
    warn_about_sampler(model_or_pipeline, compiled.schedule)
    install(model_or_pipeline, compiled)
    if others := other_denoisers(model_or_pipeline):
        log.warning(
            "%s has more than one denoiser: one %s runs under the schedule; %s runs uncached",
            type(model_or_pipeline).__name__,
            type(compiled.model).__name__,
            " and ".join(others),
        )
    return model_or_pipeline
