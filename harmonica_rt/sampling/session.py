"""Which run a call of a denoiser belongs to, and which of its steps.

One call at a time, one run at a time. A run begins with `reset()` or, for a pipeline's denoiser, when its scheduler
sets timesteps; it advances with every call, or with every scheduler step (`step_count`). In a pipeline, calls that do
not come from the function that began the run (`origin`) go to the plain model. If `reset()` begins the runs, loops
that alternate are told apart by the functions that called it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.changes import Changes, Turns
from harmonica_rt.engine import Engine
from harmonica_rt.errors import ConcurrentRunError, HarmonicaError
from harmonica_rt.sampling.by_hand import ByHand
from harmonica_rt.sampling.current_run import CurrentRun
from harmonica_rt.sampling.displaced import DisplacedRuns, interleaved
from harmonica_rt.sampling.following import Following
from harmonica_rt.sampling.frames import calling_scheduler
from harmonica_rt.sampling.notices import Notices
from harmonica_rt.sampling.origin import Origin
from harmonica_rt.sampling.run import Run
from harmonica_rt.sampling.run_stats import RunStats
from harmonica_rt.sampling.run_timesteps import timesteps_are_set
from harmonica_rt.sampling.schedule_choice import RunSchedule, ScheduleChoice
from harmonica_rt.sampling.step_count import StepCount
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.torch_state import keep_torch_state


class Session:
    """The runs of one model under one schedule, over any engine.

    Args:
        model_name: the class name of the model, for messages.
        schedule: what to reuse at each step, or schedules for several numbers of steps.
        engine: makes the streams of a run.
        on_other_steps: what becomes of runs with a number of steps that no schedule is for, one of `OTHER_STEPS`.

    Attributes:
        undone_by: the call that removes it from a pipeline, for messages.
    """

    undone_by = "harmonica_rt.uncompile(pipe)"

    def __init__(
        self, model_name: str, schedule: Schedule | ScheduleSet, engine: Engine, on_other_steps: str = "error"
    ) -> None:
        self.engine = engine
        self.last_stats: RunStats | None = None  # counts of the last run that is over
        self._model_name = model_name
        self._choice = ScheduleChoice(schedule, on_other_steps, model_name)
        self._turns = Turns()
        self._current = CurrentRun()
        self._following = Following(self)
        self._displaced = DisplacedRuns()
        self._by_hand = ByHand()
        self._notices = Notices()

    @property
    def schedule(self) -> Schedule | ScheduleSet:
        """The schedule, or the schedules for several numbers of steps, as given."""
        return self._choice.given

    def reset(self, timesteps: Sequence[float] | torch.Tensor | None = None, *, steps: int | None = None) -> None:
        """Begin a new run: the next call is step 0. A pipeline's denoiser does so automatically.

        Args:
            timesteps: those of the run, one per step, in any scale and on any device; runs with equal timesteps count
                as alike. On a GPU, where comparing timesteps would wait for the device, only runs that pass them
                compute timestep work beforehand.
            steps: the number of steps; not needed with timesteps, or where the only schedule has this number.

        Raises:
            ScheduleMismatchError: no schedule is for this number of steps, or there are several and no number.
            ArgumentError: the timesteps are not numbers, or `steps` is not their number.
        """
        under, key = self._choice.of_reset(timesteps, steps)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._by_hand.begins(self._current.run)
            self._begin(under).key = key

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a copy would share the scheduler's listener and what torch.compile holds."""
        raise HarmonicaError(
            f"the session of a compiled {self._model_name} cannot be copied or pickled; copy the plain model and "
            "compile the copy"
        )

    @property
    def stats(self) -> RunStats | None:
        """Counts of the current run so far, or of the last run if none is under way."""
        run = self._current.run
        return run.stats if run is not None and not run.untouched else self.last_stats

    @property
    def pipelines(self) -> list[Any]:
        """The pipelines it is in; empty for a standalone model, or if they have been garbage-collected."""
        return self._following.pipelines

    def attach(self, pipeline: Any) -> None:
        """Let the pipeline's scheduler, looked up at every call, drive the runs; of several, that which began last."""
        self._following.add(pipeline)

    def leave(self, pipeline: Any) -> None:
        """Stop following this pipeline's scheduler."""
        self._following.leave(pipeline)

    def detach(self) -> None:
        """Stop following all schedulers; from now on, runs begin with `reset()`."""
        self._following.release()
        current = self._current
        current.scheduler = current.run = current.origin = current.count = None
        self._displaced.forget_suspended()

    def run_begins(self, scheduler: Any) -> None:
        """A scheduler sets its timesteps: the previous run, if any, is over, finished or not."""
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._begin_driven(scheduler, Origin(scheduler))

    def step_begins(self, scheduler: Any, timestep: Any) -> None:
        """The scheduler is stepped; check that the timestep is this step's, and the thread the run's."""
        current = self._current
        self._displaced.check_call(current)
        run = current.driven_by(scheduler)
        if run is None:
            self._displaced.check_step(current, scheduler)
            return
        run.check_thread()
        if run.uncached:
            return
        if run.untouched or current.count is None:
            self._notices.say_not_called(type(scheduler).__name__, self._model_name)
        else:
            current.count.step_begins(timestep)

    def step_ends(self, scheduler: Any) -> None:
        """The step is over."""
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            current = self._current
            run = current.driven_by(scheduler)
            if run is None or run.untouched or current.count is None:
                return
            if run.uncached:
                run.advance()
            else:
                current.count.step_ends()
            if run.finished:
                self.last_stats, current.run = run.stats, None

    def _call(self, call: Call, uncached: Callable[[], Any]) -> Any:
        """One call of the denoiser; `uncached` runs in its place outside a pipeline's runs."""
        if self._following:
            return self._call_in_pipeline(call, uncached)
        run = self._current.run or self._begin(self._choice.of_unknown())
        run.check_thread()
        if not self._by_hand.makes_this_call(run):
            raise interleaved()
        if run.uncached:
            return run.call_uncached(uncached, counts_as_step=True)
        return run.call(call, counts_as_step=True)

    def _call_in_pipeline(self, call: Call, uncached: Callable[[], Any]) -> Any:
        caller, new = calling_scheduler(), self._following.follow_replacements()
        begun = [s for s in new if caller is s or (caller is None and timesteps_are_set(s))]
        if begun:
            self._begin_driven(begun[-1], Origin(begun[-1], seen=False))
        current = self._current
        self._displaced.check_call(current)
        run = current.run
        if run is None or not current.makes_this_call(run, caller):
            swapped = not current.ever_driven and self._following.follows(caller)
            self._notices.say_outside(self._model_name, swapped=swapped)
            return uncached()
        if run.untouched and not run.failed:
            run = self._as_set()
        if run.uncached:
            return run.call_uncached(uncached, counts_as_step=False)
        if current.count is not None and not run.failed and not current.count.admits(call):
            return uncached()
        return run.call(call, counts_as_step=False)

    def _as_set(self) -> Run:
        """Begin the current run as its scheduler is set: before its first call, not earlier, the scheduler is told all.

        Raises:
            ScheduleMismatchError: the scheduler is set to a number of steps that no schedule is for.
        """
        current = self._current
        under, steps = self._choice.of_scheduler(current.scheduler)
        current.run = run = Run(under, self.engine, self._notices, any_thread=False)
        run.begin_at(steps.first)
        run.key = steps.key
        current.count = StepCount(run, steps, self._model_name, self._notices)
        return run

    def _begin_driven(self, scheduler: Any, origin: Origin) -> None:
        """Begin a run that a scheduler drives."""
        current = self._current
        self._displaced.suspend(current, scheduler, origin)
        self._begin()
        current.scheduler, current.origin, current.ever_driven = scheduler, origin, True

    def _begin(self, under: RunSchedule | None = None) -> Run:
        """Begin a run under this schedule; None if it is not known yet."""
        thread, current = threading.current_thread(), self._current
        before = current.run
        if before is not None and not before.untouched:
            self.last_stats = before.stats
            if not before.finished:
                before.abandon()
            owner = before.thread
            if self._following and owner is not None and owner is not thread:
                self._displaced.interrupt(owner, current.origin)
        self._displaced.readmit(thread)
        current.origin = current.count = None
        under = under or RunSchedule(self._choice.schedules.schedules[0])
        current.run = Run(under, self.engine, self._notices, any_thread=not self._following)
        return current.run

    def _enter(self, changes: Changes) -> None:
        """Exclude other callers until `changes` are undone, which also restores the thread's current torch state.

        Raises:
            ConcurrentRunError: another call is under way.
        """
        if self._turns.mine:
            raise ConcurrentRunError(
                f"a run of {self._model_name} cannot begin or continue within one of its calls (in a hook of the "
                "model, for example)"
            )
        if not self._turns.take(changes):
            raise ConcurrentRunError(
                f"another thread is in a call of {self._model_name}. Use one compiled model (and one pipeline) for "
                "each thread, or let the runs take turns"
            )
        keep_torch_state(changes)
