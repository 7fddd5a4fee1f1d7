"""The compiled model: what `compile` returns for a model and installs in a pipeline."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from harmonica_rt.api.subject import runs_through_torch_compile
from harmonica_rt.arguments import check_path
from harmonica_rt.errors import HarmonicaError, PlanFileError
from harmonica_rt.execute.plan_cache import PlanKey
from harmonica_rt.execute.plan_runtime import PlanRuntime
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.options import CompileOptions
from harmonica_rt.parity.lockstep import LockstepEngine
from harmonica_rt.pipelines.denoiser import PipelineDenoiser
from harmonica_rt.planfile import file as plan_file
from harmonica_rt.report import Report
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.wrappers import unwrapped


class CompiledModel(PipelineDenoiser):
    """A model compiled with a schedule. It is called like the model, one run at a time; see `compile`."""

    def __init__(
        self, given: nn.Module, schedule: Schedule | ScheduleSet, planned: PlannedEngine, *, verify: bool
    ) -> None:
        self._planned = planned
        lockstep = None
        if verify:
            first = ScheduleSet.of(schedule).schedules[0]
            lockstep = LockstepEngine(unwrapped(given), first, planned, tolerance="auto", raise_at_once=True)
        super().__init__(given, schedule, lockstep or planned, planned.options.on_other_steps)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles hold the model, the schedule and the options; their plans are made at their first call."""
        verify = isinstance(self.engine, LockstepEngine)
        return _compile_copy, (self.given, self.schedule, self._planned.options, verify)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedules and all plans, without the model's parameters, as JSON for `load`. The write is atomic.

        Raises:
            HarmonicaError: there is no plan yet (the first call makes one).
            PlanFileError: a plan cannot be expressed as JSON, or the file cannot be written.
        """
        check_path(path)
        plans = self._planned.saved()
        if not plans:
            raise HarmonicaError("there is no plan to save yet: the first call of the compiled model makes one")
        try:
            plan_file.write(path, self.model, self.schedule, self._planned.options, plans)
        except OSError as error:
            raise PlanFileError(
                f"{os.fspath(path)}: cannot be written ({error.strerror}); give a file in a folder that exists and can "
                "be written to"
            ) from error

    def _look_who_calls(self, callers: list[Any]) -> None:
        """Follow a pipeline among `callers`; raise HarmonicaError if torch.compile with our backend is among them."""
        for caller in callers:
            inner = getattr(caller, "__dict__", {}).get("_modules", {}).get("_orig_mod")
            if (inner is self or inner is self.model) and runs_through_torch_compile(caller):
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


def _compile_copy(
    given: nn.Module, schedule: Schedule | ScheduleSet, options: CompileOptions, verify: bool
) -> CompiledModel:
    engine = PlannedEngine(unwrapped(given), ScheduleSet.of(schedule).schedules[0], options)
    return CompiledModel(given, schedule, engine, verify=verify)
