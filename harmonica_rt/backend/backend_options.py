"""The options that the backend takes from `torch.compile`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harmonica_rt.arguments import check_schedule
from harmonica_rt.errors import ArgumentError, HarmonicaError
from harmonica_rt.options import CompileOptions
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.untrusted.text import described

NAME = "harmonica"


@dataclass(frozen=True)
class BackendOptions:
    """The `options` given to `torch.compile`: schedule or set of schedules, and those that `hrt.compile` takes."""

    schedule: Schedule | ScheduleSet
    plans: CompileOptions

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> BackendOptions:
        """Check the given options.

        Raises:
            ArgumentError: the schedule is missing or not a schedule, a lowering or graph mode is unknown, or an option
                has the wrong type.
            HarmonicaError: an option is unknown.
        """
        given = {} if given is None else given
        example = f'torch.compile(model, backend="{NAME}", options={{"schedule": schedule}})'
        if not isinstance(given, Mapping):
            raise ArgumentError(f"backend {NAME!r} takes its options as a dict, got {described(given)}: {example}")
        names = ("schedule", *(field.name for field in dataclasses.fields(CompileOptions) if field.name != "strict"))
        unknown = [name for name in given if name not in names]
        if unknown:
            raise HarmonicaError(f"backend {NAME!r} has no option {unknown[0]!r}; it has {', '.join(names)}")
        if "schedule" not in given:
            raise ArgumentError(f"backend {NAME!r} needs a harmonica_rt.Schedule: {example}")
        rest = {**given}
        schedule = rest.pop("schedule")
        check_schedule(schedule)
        return cls(schedule, CompileOptions(**rest))
