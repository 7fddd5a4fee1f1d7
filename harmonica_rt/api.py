"""The public functions: their arguments, results and errors. The work itself is done elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, TypeVar, Unpack, overload

from torch import nn

from harmonica_rt.arguments import (
    check_path,
    check_pipeline,
    check_pipeline_arguments,
    check_schedule,
    check_seed,
    check_subject,
    check_tolerance,
    checked_calls,
)
from harmonica_rt.errors import ArgumentError, HarmonicaError, InvariantError, PlanFileError
from harmonica_rt.execute.plan_cache import PlanKey
from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.options import DEFAULT_LOWERING, CompileKeywords, CompileOptions, LoadKeywords, check_flags
from harmonica_rt.parity.lockstep import LockstepEngine, Tolerance
from harmonica_rt.parity.report import ParityReport
from harmonica_rt.parity.verify import verify_model, verify_pipeline
from harmonica_rt.pipelines.denoiser import PipelineDenoiser
from harmonica_rt.pipelines.fit import check_fit, warn_about_sampler
from harmonica_rt.pipelines.install import (
    denoiser_module,
    held_denoiser,
    install,
    install_assigned,
    installed,
    other_denoisers,
    uninstall,
)
from harmonica_rt.planfile import file as plan_file
from harmonica_rt.reference_engine import ReferenceEngine
from harmonica_rt.report import Report
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.schedule import Schedule
from harmonica_rt.wrappers import unwrapped

log = logging.getLogger(__name__)

P = TypeVar("P")


class CompiledModel(PipelineDenoiser):
    """A model compiled with a schedule. It is called like the model, one run at a time; see `compile`."""

    def __init__(self, given: nn.Module, schedule: Schedule, planned: PlannedEngine, *, verify: bool) -> None:
        self._planned = planned
        lockstep = None
        if verify:
            lockstep = LockstepEngine(unwrapped(given), schedule, planned, tolerance="auto", raise_at_once=True)
        super().__init__(given, schedule, lockstep or planned)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles hold the model, the schedule and the options; their plans are made at their first call."""
        verify = isinstance(self.engine, LockstepEngine)
        return _compiled_again, (self.given, self.schedule, self._planned.options, verify)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule and all plans, without weights, as JSON for `load`. The write is atomic.

        Raises:
            HarmonicaError: there is no plan yet (the first call makes one).
            PlanFileError: a plan cannot be expressed as JSON, or the file cannot be written.
        """
        check_path(path)
        plans = self._planned.saved()
        if not plans:
            raise HarmonicaError("there is no plan to save yet: the first call of the compiled model makes one")
        try:
            plan_file.write(path, self.model, self.schedule, self._planned.options.lowering, plans)
        except OSError as error:
            raise PlanFileError(
                f"{os.fspath(path)}: cannot be written ({error.strerror}); give a file in a folder that exists and can "
                "be written to"
            ) from error

    def _look_who_calls(self, callers: list[Any]) -> None:
        for caller in callers:
            inner = getattr(caller, "__dict__", {}).get("_modules", {}).get("_orig_mod")
            if (inner is self or inner is self.model) and _through_torch_compile(caller):
                raise HarmonicaError(
                    f"this {type(self.model).__name__} is compiled twice, by harmonica_rt.compile and by torch.compile "
                    "with this package's backend, each with a schedule. Undo one of them: "
                    "harmonica_rt.uncompile(pipe), or pipe.transformer = pipe.transformer._orig_mod"
                )
        super()._look_who_calls(callers)

    @property
    def plans(self) -> dict[PlanKey, PlanRuntime]:
        """The plans in memory, from the least to the most recently used, for inspection."""
        return self._planned.plans

    def report(self) -> Report:
        """What is computed, reused, stored and saved; prints as a table."""
        failures = self._planned.failures_now
        return Report.of(type(self.model).__name__, self.schedule, self._planned.cache, self.stats, failures)


@overload
def compile(
    model_or_pipeline: nn.Module,
    schedule: Schedule,
    *,
    verify: bool = ...,
    **options: Unpack[CompileKeywords],
) -> CompiledModel: ...


@overload
def compile(
    model_or_pipeline: P,
    schedule: Schedule,
    *,
    verify: bool = ...,
    **options: Unpack[CompileKeywords],
) -> P: ...


def compile(
    model_or_pipeline: Any,
    schedule: Schedule,
    *,
    lowering: str = DEFAULT_LOWERING,
    graphs: str = "auto",
    verify: bool = False,
    strict: bool = False,
    max_plans: int = 8,
    max_plan_bytes: int | None = None,
    debug: bool = False,
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
        schedule: which sites to compute and which to reuse in each step.
        lowering: `fused` uses fused ops and computes everything that does not depend on the latents before the steps;
            it equals the reference up to rounding. `inductor` also compiles what lies between the fused ops, each
            unique region once, in seconds to minutes. `plain` runs operator by operator; on CPU it equals the reference
            bit for bit.
        graphs: on a CUDA device, `auto` records each step program as a CUDA graph and keeps it where it measures faster
            than plain launches, `on` keeps every one, `off` records none. Elsewhere there are no graphs.
        verify: run the reference alongside and raise ParityError at the first step that differs. Costs the time of
            both; meant for trying a schedule out.
        strict: raise CaptureError where the model cannot be captured, instead of running eagerly with a warning.
        max_plans: number of plans kept at once, at least 1; the least recently used one is dropped.
        max_plan_bytes: bytes of device memory that all plans may hold (cached features, inputs of CUDA graphs, and
            memory that graphs reserved); by default a quarter of a GPU's memory, and no limit on a CPU. The least
            recently used plans are dropped; those of the current run stay, however large they are.
        debug: fill slots with NaN before they are written and after their last read.

    Raises:
        ScheduleMismatchError: the schedule was made for another model.
        SiteError: the model lacks a site, or one site lies inside another.
        ArgumentError: an argument is no model, pipeline or schedule where one is expected, or an option has the wrong
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
    )
    planned = _planned(model_or_pipeline, schedule, options)
    return _take_over(model_or_pipeline, CompiledModel(_held(model_or_pipeline), schedule, planned, verify=verify))


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
) -> Any:
    """Compile as `compile` did for the saved model, with the saved schedule, lowering and plans.

    Calls with a saved signature are not captured or planned again; other signatures get their plans as usual.

    Args:
        path: a file that `CompiledModel.save` wrote.
        model_or_pipeline: the same model in the same state (weights may differ in value), or a pipeline with it.
        graphs, strict, max_plans, max_plan_bytes: see `compile`.

    Raises:
        PlanFileError: the file is missing, damaged, or made for another model, torch or version.
        CaptureError: the model is in training mode, or has hooks inside.
        RegionError: Inductor cannot compile a region.
        ArgumentError, HarmonicaError: as `compile`.
    """
    check_path(path)
    options = CompileOptions(graphs=graphs, strict=strict, max_plans=max_plans, max_plan_bytes=max_plan_bytes)
    model = _model_to_compile(model_or_pipeline)
    try:
        found = plan_file.read(path, model)
    except OSError as error:
        raise PlanFileError(f"{os.fspath(path)}: cannot be read as a saved plan ({error.strerror})") from error
    options = dataclasses.replace(options, lowering=found.lowering, max_plans=max(max_plans, len(found.plans)))
    planned = _planned(model_or_pipeline, found.schedule, options)
    try:
        planned.restore(found.plans)
    except (PlanFileError, InvariantError) as error:
        raise PlanFileError(f"{os.fspath(path)}: {error}; compile the model and save it again") from error
    return _take_over(model_or_pipeline, CompiledModel(_held(model_or_pipeline), found.schedule, planned, verify=False))


def uncompile(pipeline: P) -> P:
    """Restore a pipeline's plain denoiser and scheduler, and return the same pipeline.

    Nothing happens to a pipeline that is not compiled.

    Raises:
        ArgumentError: not a pipeline.
    """
    check_pipeline(pipeline)
    install_assigned(pipeline)
    uninstall(pipeline)
    return pipeline


def get_compiled(pipeline: Any) -> CompiledModel:
    """The compiled denoiser inside a pipeline, for its `report()`.

    Raises:
        ArgumentError: not a pipeline.
        HarmonicaError: the pipeline is not compiled.
    """
    check_pipeline(pipeline)
    install_assigned(pipeline)
    compiled, name = installed(denoiser_module(pipeline)), type(pipeline).__name__
    if isinstance(compiled, CompiledModel):
        return compiled
    if compiled is not None:
        raise HarmonicaError(f"this {name} is not compiled but runs the reference; compile(pipe, schedule) compiles it")
    if _through_torch_compile(held_denoiser(pipeline)):
        raise HarmonicaError(
            f"this {name} is not compiled by harmonica_rt.compile but by torch.compile; "
            "attach(pipe.transformer).report() reports on it"
        )
    raise HarmonicaError(f"this {name} is not compiled; harmonica_rt.compile(pipe, schedule) does")


@overload
def reference(model_or_pipeline: nn.Module, schedule: Schedule) -> Denoiser: ...


@overload
def reference(model_or_pipeline: P, schedule: Schedule) -> P: ...


def reference(model_or_pipeline: Any, schedule: Schedule) -> Any:
    """The plain model, run eagerly with the same schedule by replacing site outputs: the truth for parity.

    Takes and returns what `compile` does, and `uncompile` undoes it in a pipeline.

    Raises:
        ScheduleMismatchError, SiteError, ArgumentError, HarmonicaError: as `compile`.
    """
    check_schedule(schedule)
    model = _model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    denoiser = PipelineDenoiser(_held(model_or_pipeline), schedule, ReferenceEngine(model, schedule))
    if isinstance(model_or_pipeline, nn.Module):
        return denoiser
    install(model_or_pipeline, denoiser)
    return model_or_pipeline


def verify(
    model_or_pipeline: Any,
    schedule: Schedule,
    *,
    calls: Iterable[Mapping[str, Any]] | None = None,
    lowering: str = DEFAULT_LOWERING,
    graphs: str = "auto",
    seed: int = 0,
    tolerance: Tolerance = "auto",
    **pipeline_arguments: Any,
) -> ParityReport:
    """Compare compiled with reference: every step on the reference's inputs, then the result of a free run.

    Args:
        model_or_pipeline: a model (pass `calls`), or a pipeline (pass what it is called with).
        schedule: the schedule to verify.
        calls: for a model, the keyword arguments of one call per step.
        lowering: see `compile`.
        graphs: see `compile`; with CUDA graphs, runs are repeated until all graphs have been recorded and replayed.
        seed: for a pipeline, seeds the generator of both runs unless one is passed.
        tolerance: `exact` (equal bit for bit), `measured` (at most twice the error of the eager model in this dtype,
            against a reference one precision up; floor one ulp), or `auto`: exact for `plain` on CPU, else measured.
        pipeline_arguments: arguments of the pipeline's call.

    Raises:
        ParityError: a step or the result is outside the tolerance; names the first step and site that diverge.
        CaptureError: the model cannot be captured.
        ArgumentError: `calls` is missing or does not have one entry per step of the schedule; the pipeline cannot be
            called with these arguments; or as `compile`.
    """
    check_schedule(schedule)
    CompileOptions(lowering=lowering, graphs=graphs)
    check_seed(seed)
    check_tolerance(tolerance)
    model = _model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    if not isinstance(model_or_pipeline, nn.Module):
        if calls is not None:
            raise ArgumentError("calls=[...] is for a model by itself; for a pipeline pass what it is called with")
        check_pipeline_arguments(model_or_pipeline, pipeline_arguments)
        return verify_pipeline(
            model_or_pipeline,
            schedule,
            lowering=lowering,
            graphs=graphs,
            seed=seed,
            tolerance=tolerance,
            arguments=pipeline_arguments,
        )
    if pipeline_arguments:
        raise ArgumentError(
            f"verify of a model takes no {', '.join(pipeline_arguments)}: its arguments go into calls=[...], one dict "
            "per step"
        )
    inputs = checked_calls(calls, schedule.steps)
    return verify_model(model, schedule, inputs, lowering=lowering, graphs=graphs, tolerance=tolerance)


def _planned(
    model_or_pipeline: Any,
    schedule: Schedule,
    options: CompileOptions,
) -> PlannedEngine:
    check_schedule(schedule)
    model = _model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    return PlannedEngine(model, schedule, options)


def _compiled_again(given: nn.Module, schedule: Schedule, options: CompileOptions, verify: bool) -> CompiledModel:
    return CompiledModel(given, schedule, PlannedEngine(unwrapped(given), schedule, options), verify=verify)


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


def _held(model_or_pipeline: Any) -> nn.Module:
    """The model as it was given, with its wrappers."""
    check_subject(model_or_pipeline)
    if isinstance(model_or_pipeline, Denoiser):
        return model_or_pipeline.given
    if isinstance(model_or_pipeline, nn.Module):
        return model_or_pipeline
    return held_denoiser(model_or_pipeline)


def _model_to_compile(model_or_pipeline: Any) -> nn.Module:
    """The plain model without its wrappers; raises HarmonicaError if a torch.compile wrapper holds it compiled."""
    check_subject(model_or_pipeline)
    if not isinstance(model_or_pipeline, nn.Module):
        install_assigned(model_or_pipeline)
    held = _held(model_or_pipeline)
    model: nn.Module = unwrapped(held)
    if isinstance(model, Denoiser):
        raise HarmonicaError(
            f"torch.compile wraps a compiled {type(model.model).__name__} here; compile the model itself: "
            "wrapper._orig_mod.model"
        )
    if held is not model and _through_torch_compile(held):
        raise HarmonicaError(
            f"this {type(model).__name__} is compiled already, by torch.compile with this package's backend. Undo "
            "that first: harmonica_rt.attach(pipe.transformer).detach(), then "
            "pipe.transformer = pipe.transformer._orig_mod"
        )
    return model


def _through_torch_compile(module: nn.Module) -> bool:
    """Whether torch.compile compiled it with our backend."""
    if not hasattr(module, "_orig_mod") and not isinstance(module.__dict__.get("_compiled_call_impl"), FunctionType):
        return False
    from harmonica_rt.backend import is_backend_of  # dynamo is already in use when this line is reached

    return is_backend_of(module)
