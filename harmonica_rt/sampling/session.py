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
from harmonica_rt.engine import Engine, RunKey
from harmonica_rt.errors import ConcurrentRunError, HarmonicaError
from harmonica_rt.sampling.by_hand import ByHand
from harmonica_rt.sampling.current_run import CurrentRun
from harmonica_rt.sampling.displaced import DisplacedRuns, interleaved
from harmonica_rt.sampling.following import Following
from harmonica_rt.sampling.frames import calling_scheduler
from harmonica_rt.sampling.notices import Notices
from harmonica_rt.sampling.origin import Origin
from harmonica_rt.sampling.run import Run, RunStats
from harmonica_rt.sampling.run_timesteps import RunSteps, timesteps_are_set
from harmonica_rt.sampling.step_count import StepCount
from harmonica_rt.schedule import Schedule
from harmonica_rt.torch_state import keep_torch_state


class Session:
    """The runs of one model under one schedule, over any engine.

    Args:
        model_name: the class name of the model, for messages.
        schedule: what to reuse at each step.
        engine: makes the streams of a run.

    Attributes:
        undone_by: the call that removes it from a pipeline, for messages.
    """

    undone_by = "harmonica_rt.uncompile(pipe)"

    def __init__(self, model_name: str, schedule: Schedule, engine: Engine) -> None:
        self.schedule = schedule
        self.engine = engine
        self.last_stats: RunStats | None = None  # counts of the last run that is over
        self._model_name = model_name
        self._turns = Turns()
        self._current = CurrentRun()
        self._following = Following(self)
        self._displaced = DisplacedRuns()
        self._by_hand = ByHand()
        self._notices = Notices()

    def reset(self, timesteps: Sequence[float] | torch.Tensor | None = None) -> None:
        """Begin a new run: the next call is step 0. A pipeline's denoiser does so automatically.

        Args:
            timesteps: the run's timesteps, one per step of the schedule, in any scale and on any device; runs with
                equal timesteps count as alike. On a GPU, where comparing timesteps would wait for the device, only runs
                that pass them compute timestep work beforehand.

        Raises:
            ScheduleMismatchError: the number of timesteps differs from the schedule's number of steps.
            ArgumentError: the timesteps are not numbers.
        """
        key = None if timesteps is None else RunKey.of(timesteps, self.schedule.steps)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._by_hand.begins(self._current.run)
            self._begin().key = key

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
        """Let the pipeline's scheduler, looked up again at every call, begin the runs and count the steps.

        If there are several pipelines, the scheduler whose run began last drives the session.
        """
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
        if run.untouched or current.count is None:
            self._notices.say(
                "not called",
                "%s took a step without a call of the compiled %s. If its pipeline was given another denoiser after it "
                "was compiled (pipe.transformer = ...), compile the pipeline again: until then it runs uncached",
                type(scheduler).__name__,
                self._model_name,
            )
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
            current.count.step_ends()
            if run.finished:
                self.last_stats, current.run = run.stats, None

    def _call(self, call: Call, uncached: Callable[[], Any]) -> Any:
        """One call of the denoiser; `uncached` runs in its place outside a pipeline's runs."""
        if self._following:
            return self._call_in_pipeline(call, uncached)
        run = self._current.run or self._begin()
        run.check_thread()
        if not self._by_hand.makes_this_call(run):
            raise interleaved()
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
            self._say_outside(caller)
            return uncached()
        if run.untouched:
            current.count = self._step_count_of(run)
        if current.count is not None and not run.failed and not current.count.admits(call):
            return uncached()
        return run.call(call, counts_as_step=False)

    def _say_outside(self, caller: Any) -> None:
        if not self._current.ever_driven and self._following.follows(caller):
            self._notices.say(
                "swapped",
                "%s was compiled in the middle of a run of its pipeline: the rest of that run is uncached, and the "
                "schedule applies from the next run on. To treat some steps differently, use one schedule that does",
                self._model_name,
            )
            return
        self._notices.say(
            "outside",
            "%s was called outside a sampling run (its pipeline's scheduler set no timesteps, or the call came from a "
            "callback, from after the run, or from a pipeline that was not compiled): such calls run the plain model, "
            "and nothing is cached",
            self._model_name,
        )

    def _step_count_of(self, run: Run) -> StepCount:
        """Before the first call of a run, determine which steps of the schedule it takes, and begin to count them.

        Raises:
            ScheduleMismatchError: the scheduler is set to another number of steps than the schedule has.
        """
        steps = RunSteps.of(self._current.scheduler, self.schedule.steps)
        run.begin_at(steps.first)
        run.key = steps.key
        return StepCount(run, steps, self._model_name, self._notices)

    def _begin_driven(self, scheduler: Any, origin: Origin) -> None:
        """Begin a run that a scheduler drives."""
        current = self._current
        self._displaced.suspend(current, scheduler, origin)
        self._begin()
        current.scheduler, current.origin, current.ever_driven = scheduler, origin, True

    def _begin(self) -> Run:
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
        current.run = Run(self.schedule, self.engine, self._notices, any_thread=not self._following)
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
