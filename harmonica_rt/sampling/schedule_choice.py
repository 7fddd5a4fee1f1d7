"""Which schedule a run is under, by its number of steps.

Hazard: a run that begins at a later step (image-to-image) makes fewer calls than its scheduler has timesteps. It is no
run of another number of steps: it takes the last rows of a schedule for all of them. So both numbers are looked for
before a run counts as one that no schedule is for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from harmonica_rt.engine import RunKey
from harmonica_rt.errors import ArgumentError, ScheduleMismatchError
from harmonica_rt.options import check_whole_number
from harmonica_rt.sampling.run_timesteps import HINT, RunSteps, steps_of
from harmonica_rt.schedule import Schedule, ScheduleSet

log = logging.getLogger(__name__)

MAX_KEPT = 16  # resampled schedules


@dataclass(frozen=True)
class RunSchedule:
    """The schedule of a run.

    Attributes:
        schedule: what the run is under.
        resampled_from: the number of steps of the schedule that this one was resampled from; None if it was not.
        uncached: whether the plain model makes the calls of the run; then the schedule computes everything.
    """

    schedule: Schedule
    resampled_from: int | None = None
    uncached: bool = False


class ScheduleChoice:
    """The schedules of one compiled model, and what becomes of runs that none of them is for.

    Args:
        given: the schedule, or several for different numbers of steps.
        on_other_steps: see `harmonica_rt.compile`.
        model_name: name of the model in log messages.

    Attributes:
        given: as given.
        schedules: the same as a set.
    """

    def __init__(self, given: Schedule | ScheduleSet, on_other_steps: str, model_name: str) -> None:
        self.given = given
        self.schedules = ScheduleSet.of(given)
        self.on_other_steps = on_other_steps
        self._model_name = model_name
        self._made: dict[int, RunSchedule] = {}  # for numbers of steps that no schedule is for, the latest last

    def expected(self, asked: int, left_out: int) -> int:
        """The number of steps of the schedule for a run of a scheduler.

        That of a schedule for all steps comes before that of one for the steps that run. Where there is neither, it is
        all steps or, if other numbers are errors, the number of steps of the nearest schedule, which does not fit.

        Args:
            asked: the number of timesteps that the scheduler is set to.
            left_out: how many of them the run skips at its beginning.
        """
        fitting = [steps for steps in (asked, asked - left_out) if steps in self.schedules.steps]
        if fitting:
            return fitting[0]
        return self.schedules.nearest(max(asked, 1)).steps if self.on_other_steps == "error" else asked

    def of(self, steps: int, told: str | None = None) -> RunSchedule:
        """The schedule for a run of this number of steps; `told`: by what it is known, for messages.

        Raises:
            ScheduleMismatchError: there is none, and other numbers of steps are errors.
        """
        if steps in self.schedules.steps:
            return RunSchedule(self.schedules.resample(steps))
        if self.on_other_steps == "error" or steps < 1:
            raise ScheduleMismatchError(f"{self.described}, {told or f'the run has {steps}'}; {HINT}")
        found = self._made.pop(steps, None) or self._for_other(steps)
        self._made = {**dict(list(self._made.items())[1 - MAX_KEPT :]), steps: found}
        return found

    def of_scheduler(self, scheduler: Any) -> tuple[RunSchedule, RunSteps]:
        """The schedule for the run that a scheduler is set to, and the steps of it that the run takes.

        Raises:
            ScheduleMismatchError: no schedule is for its number of steps, and other numbers are errors.
        """
        asked = steps_of(scheduler)
        if asked is None:
            under = self.of_unknown()
        else:
            expected, (steps, left_out) = self.expected(*asked), asked
            if expected not in (steps, steps - left_out) and len(self.schedules.steps) > 1:
                expected = steps  # an error that names the numbers of all schedules
            under = self.of(expected, f"the pipeline asked for {steps} ({type(scheduler).__name__})")
        return under, RunSteps.of(scheduler, under.schedule.steps)

    def of_reset(self, timesteps: object, steps: int | None) -> tuple[RunSchedule, RunKey | None]:
        """The schedule for a run that begins by hand, and its key; see `Session.reset`.

        Raises:
            ArgumentError, ScheduleMismatchError: see there.
        """
        key = None if timesteps is None else RunKey.of(timesteps)
        if steps is not None:
            check_whole_number("steps", steps, least=1)
        if key is not None and steps not in (None, len(key.timesteps)):
            raise ArgumentError(f"reset got steps={steps} and {len(key.timesteps)} timesteps; pass one of the two")
        if key is not None:
            count = len(key.timesteps)
            return self.of(count, f"reset got {count} timesteps"), key
        return self.of_unknown() if steps is None else self.of(steps, f"reset got steps={steps}"), None

    def of_unknown(self) -> RunSchedule:
        """The schedule for a run whose number of steps nothing tells: the only one.

        Raises:
            ScheduleMismatchError: there are several.
        """
        if len(self.schedules.steps) > 1:
            raise ScheduleMismatchError(
                f"{self.described}: pass the number of steps of this run to reset(steps=...), or its timesteps"
            )
        return self.of(self.schedules.steps[0])

    @property
    def described(self) -> str:
        """What the schedules are for, to begin a message with."""
        *rest, last = self.schedules.steps
        return (
            f"the schedules are for {', '.join(map(str, rest))} and {last} steps"
            if rest
            else f"the schedule is for {last} steps"
        )

    def _for_other(self, steps: int) -> RunSchedule:
        nearest = self.schedules.nearest(steps)
        if self.on_other_steps == "plain":
            log.warning(
                "%s: %s, so a run of %d steps is uncached. on_other_steps='resample' would resample a schedule for it",
                *(self._model_name, self.described, steps),
            )
            return RunSchedule(Schedule.all_compute(steps=steps, sites=nearest.sites), uncached=True)
        log.info(
            "%s: the schedule for %d steps was resampled for a run of %d steps", self._model_name, nearest.steps, steps
        )
        return RunSchedule(nearest.resample(steps), nearest.steps)
