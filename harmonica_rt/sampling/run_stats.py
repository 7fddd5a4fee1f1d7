"""Counts of what a run has done, for reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmonica_rt.sampling.schedule_choice import RunSchedule


@dataclass
class RunStats:
    """Counts of what one run has done so far.

    Attributes:
        calls: calls of the denoiser.
        entries: sites of all those calls, computed or reused.
        reused: those that were reused.
        catch_ups: steps of the calls that were computed in full to catch up.
        first: the step that the run began with.
        under: the schedule of the run.
    """

    under: RunSchedule
    calls: int = 0
    entries: int = 0
    reused: int = 0
    catch_ups: list[int] = field(default_factory=list)
    first: int = 0
