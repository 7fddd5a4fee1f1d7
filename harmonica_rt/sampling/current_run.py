"""The run under way, and what drives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harmonica_rt.sampling.origin import Origin
from harmonica_rt.sampling.run import Run
from harmonica_rt.sampling.step_count import StepCount


@dataclass
class CurrentRun:
    """The state of a session: its current run, with the scheduler that drives it.

    Attributes:
        run: the run; None before the first one, and after the last step of one that a scheduler drove.
        scheduler: the scheduler that drives the run or drove the last one; None if none ever did.
        origin: the function that the run comes from; None where `reset()` began it.
        count: counts the steps, from the first call of the run on.
        ever_driven: whether a scheduler ever began a run.
    """

    run: Run | None = None
    scheduler: Any = None
    origin: Origin | None = None
    count: StepCount | None = None
    ever_driven: bool = False

    def driven_by(self, scheduler: Any) -> Run | None:
        """The run, if this scheduler drives it; else None."""
        run = self.run
        if run is None or run.finished or scheduler is not self.scheduler:
            return None
        over = not run.untouched and self.origin is not None and self.origin.over
        return None if over else run

    @property
    def under_way(self) -> bool:
        """Whether the run has begun and may go on, as far as the stack shows: its function has not returned."""
        run, origin = self.run, self.origin
        if run is None or run.untouched or run.finished or run.failed:
            return False
        return origin is not None and origin.known and not origin.over

    def makes_this_call(self, run: Run, caller: Any) -> bool:
        """Whether the call under way, from the pipeline with scheduler `caller` (None: no pipeline), is the run's.

        Raises:
            ConcurrentRunError: the run belongs to another thread.
        """
        origin, scheduler = self.origin, self.scheduler
        if origin is None:
            mine = caller is None or caller is scheduler
        else:
            if run.untouched:
                origin.settle(scheduler)
            mine = not origin.over
        if mine:
            run.check_thread()
        return mine and (origin is None or origin.distance(scheduler) is not None)
