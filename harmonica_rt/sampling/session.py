"""Which run a call of a denoiser belongs to, and which of its steps.

One call at a time, one run at a time. A run begins with `reset()` or, for a pipeline's denoiser, when its scheduler
sets timesteps; it advances with every call, or with every scheduler step (`step_count`). In a pipeline, calls that do
not come from the function that began the run (`origin`) go to the plain model. If `reset()` begins the runs, loops
that alternate are told apart by the functions that called it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.changes import Changes, Turns
from harmonica_rt.engine import Engine, RunKey
from harmonica_rt.errors import ConcurrentRunError, HarmonicaError, ScheduleMismatchError
from harmonica_rt.indices import StepIndex
from harmonica_rt.sampling.following import Following
from harmonica_rt.sampling.notices import Notices
from harmonica_rt.sampling.origin import ByHand, Origin, calling_scheduler
from harmonica_rt.sampling.run import Run, RunStats
from harmonica_rt.sampling.scheduler import RunTimesteps, steps_left_out, timesteps_are_set
from harmonica_rt.sampling.step_count import StepCount
from harmonica_rt.schedule import Schedule
from harmonica_rt.torch_state import keep_torch_state

_INTERLEAVED = (
    "a sampling run went on after another one had begun on this compiled model: two loops take turns step by step (as "
    "generators do), and would take each other's features. Finish one before the other begins, or use a compiled model "
    "for each"
)


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
        self.last_stats: RunStats | None = None
        self._model_name = model_name
        self._turns = Turns()
        self._run: Run | None = None
        self._following = Following(self)
        self._scheduler: Any = None  # of the current run
        self._origin: Origin | None = None  # of the current run; None where reset() began it
        self._count: StepCount | None = None  # of the current run, from its first call on
        self._suspended: list[tuple[Origin, Any]] = []  # runs that another one displaced, and their schedulers
        self._by_hand = ByHand()
        self._notices = Notices()
        self._begun = False  # whether a scheduler ever began a run
        # Threads whose pipeline run was interrupted when another thread began one, with the origin of the interrupted
        # run. Keys are thread objects, since identifiers are reused.
        self._displaced: weakref.WeakKeyDictionary[threading.Thread, Origin | None] = weakref.WeakKeyDictionary()

    def reset(self, timesteps: Sequence[float] | torch.Tensor | None = None) -> None:
        """Begin a new run: the next call is step 0. A pipeline's denoiser does so automatically.

        Args:
            timesteps: the run's timesteps, one per step of the schedule, in any scale and on any device; they mark it
                as alike to earlier runs with equal timesteps. On a GPU, where comparing timesteps would wait for the
                device, only runs that pass them compute timestep work beforehand.

        Raises:
            ScheduleMismatchError: the number of timesteps differs from the schedule's number of steps.
            ArgumentError: the timesteps are not numbers.
        """
        key = None if timesteps is None else RunKey.of(timesteps, self.schedule.steps)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._by_hand.begins(self._run)
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
        return self._run.stats if self._run is not None and not self._run.untouched else self.last_stats

    # ---- in a pipeline

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
        self._scheduler = self._run = self._origin = self._count = None
        self._suspended.clear()

    def run_begins(self, scheduler: Any) -> None:
        """A scheduler sets its timesteps: the previous run, if any, is over, finished or not."""
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._begin_driven(scheduler, Origin(scheduler))

    def step_begins(self, scheduler: Any, timestep: Any) -> None:
        """The scheduler is stepped; check that the timestep is this step's, and the thread the run's."""
        self._check_not_displaced()
        run = self._run_driven_by(scheduler)
        if run is None:
            self._check_not_taken_over(scheduler)
            return
        run.check_thread()
        if run.untouched or self._count is None:
            self._notices.say(
                "not called",
                "%s made a step without a call of the compiled %s. If its pipeline has another denoiser since it was "
                "compiled (pipe.transformer = ...), compile the pipeline again: until then it runs uncached",
                type(scheduler).__name__,
                self._model_name,
            )
        else:
            self._count.step_begins(timestep)

    def step_ends(self, scheduler: Any) -> None:
        """The step is over."""
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            run = self._run_driven_by(scheduler)
            if run is None or run.untouched or self._count is None:
                return
            self._count.step_ends()
            if run.finished:
                self.last_stats, self._run = run.stats, None

    def _run_driven_by(self, scheduler: Any) -> Run | None:
        """The current run, if this scheduler drives it; else None."""
        run = self._run
        if run is None or run.finished or scheduler is not self._scheduler:
            return None
        over = not run.untouched and self._origin is not None and self._origin.over
        return None if over else run

    # ---- inside

    def _call(self, call: Call, uncached: Callable[[], Any]) -> Any:
        """One call of the denoiser; `uncached` runs in its place outside a pipeline's runs."""
        if self._following:
            return self._call_in_pipeline(call, uncached)
        run = self._run or self._begin()
        run.check_thread()
        if not self._by_hand.makes_this_call(run):
            raise ConcurrentRunError(_INTERLEAVED)
        return run.call(call, counts_as_step=True)

    def _call_in_pipeline(self, call: Call, uncached: Callable[[], Any]) -> Any:
        caller, replaced = calling_scheduler(), self._following.replaced()
        begun = [s for s in replaced if caller is s or (caller is None and timesteps_are_set(s))]
        if begun:
            self._begin_driven(begun[-1], Origin(begun[-1], seen=False))
        self._check_not_displaced()
        run = self._run
        if run is None or not self._makes_this_call(run, caller):
            self._say_outside(caller)
            return uncached()
        if run.untouched:
            self._count = self._set_out(run)
        if self._count is not None and not run.failed and not self._count.admits(call):
            return uncached()
        return run.call(call, counts_as_step=False)

    def _makes_this_call(self, run: Run, caller: Any) -> bool:
        """Whether the current call, from the pipeline with scheduler `caller` (None: no pipeline), is the run's.

        Raises:
            ConcurrentRunError: the run belongs to another thread.
        """
        origin, scheduler = self._origin, self._scheduler
        if origin is None:
            mine = caller is None or caller is scheduler
        else:
            if run.untouched:
                origin.settle(scheduler)
            mine = not origin.over
        if mine:
            run.check_thread()
        return mine and (origin is None or origin.distance(scheduler) is not None)

    def _say_outside(self, caller: Any) -> None:
        if not self._begun and self._following.follows(caller):
            self._notices.say(
                "swapped",
                "%s was compiled in the midst of a run of its pipeline: what is left of that run is uncached, the "
                "schedule holds from the next run on. To treat some steps differently, say so in one schedule",
                self._model_name,
            )
            return
        self._notices.say(
            "outside",
            "%s was called outside a sampling run (its pipeline's scheduler set no timesteps, or the call came from a "
            "callback, from after the run, or from a pipeline that was not compiled): such calls are the plain "
            "model's, nothing is cached",
            self._model_name,
        )

    def _set_out(self, run: Run) -> StepCount | None:
        """Before the first call of a run, determine which steps of the schedule it takes, and their timesteps.

        A run that skips its first steps uses the last rows of a schedule for all steps, or a schedule for only the
        remaining ones.
        """
        scheduler = self._scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        known = None
        if timesteps is not None:
            asked, expected = len(timesteps), self.schedule.steps
            left_out = steps_left_out(scheduler)
            whole = expected == asked
            if not whole and expected != asked - left_out:
                raise ScheduleMismatchError(self._mismatch(asked, left_out))
            run.begin_at(StepIndex(left_out if whole else 0))
            known = RunTimesteps.of(scheduler, 0 if whole else left_out)
        run.key = RunKey(known.key, run.first) if known is not None else None
        training_steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        return StepCount(run, known, float(training_steps or 1000), self._model_name, self._notices)

    def _mismatch(self, asked: int, left_out: int) -> str:
        expected, name = self.schedule.steps, type(self._scheduler).__name__
        if left_out:
            left = asked - left_out
            return (
                f"the schedule is for {expected} steps, the pipeline asked for {asked} and runs the last {left} of "
                f"them ({name} counts model evaluations). Use a schedule for {asked}, of which the last {left} steps "
                f"are used, or one for {left}"
            )
        return (
            f"the schedule is for {expected} steps, the pipeline asked for {asked} ({name} counts {asked} model "
            f"evaluations per run). Use a schedule for {asked}, or pass num_inference_steps so that {name} makes "
            f"{expected} steps"
        )

    def _begin_driven(self, scheduler: Any, origin: Origin) -> None:
        """Begin a run that a scheduler drives."""
        before = self._run
        if before is not None and not before.finished and self._origin is not None:
            unknown = not self._origin.known and scheduler is not self._scheduler and not before.untouched
            if self._origin.suspended or unknown:
                self._suspended.append((self._origin, self._scheduler))
        self._suspended = [
            (other, driver)
            for other, driver in self._suspended
            if not (other.over or other.same(origin) or (driver is scheduler and not other.known))
        ]
        self._begin()
        self._scheduler, self._origin, self._begun = scheduler, origin, True

    def _begin(self) -> Run:
        current = threading.current_thread()
        if self._run is not None and not self._run.untouched:
            self.last_stats = self._run.stats
            if not self._run.finished:
                self._run.abandon()
            owner = self._run.thread
            if self._following and owner is not None and owner is not current:
                self._displaced[owner] = self._origin
        self._displaced.pop(current, None)
        self._origin = self._count = None
        self._run = Run(self.schedule, self.engine, self._notices, any_thread=not self._following)
        return self._run

    def _check_not_displaced(self) -> None:
        current = threading.current_thread()
        if current in self._displaced:
            displaced = self._displaced[current]
            if displaced is None or not displaced.over:
                raise ConcurrentRunError(
                    "another thread began a sampling run on this compiled model before this thread's was over. Use one "
                    "compiled model (and one pipeline) for each thread, or let the runs take turns"
                )
            del self._displaced[current]
        if not self._suspended:
            return
        own = self._origin.distance(self._scheduler) if self._origin is not None and self._run is not None else None
        for origin, scheduler in self._suspended:
            distance = origin.distance(scheduler) if origin.known else None
            if distance is not None and (own is None or distance < own):
                raise ConcurrentRunError(_INTERLEAVED)

    def _check_not_taken_over(self, scheduler: Any) -> None:
        """Raise if a run of which only the scheduler is known continues while another run is under way.

        The calls of both were counted as the latter's, so neither can be trusted.
        """
        run = self._run
        if run is None or run.untouched or (self._origin is not None and self._origin.over):
            return
        if any(one is scheduler and not origin.known for origin, one in self._suspended):
            run.failed = True
            raise ConcurrentRunError(_INTERLEAVED)

    def _enter(self, changes: Changes) -> None:
        """Exclude other callers until `changes` are undone, which also restores the thread's current torch state.

        Raises:
            ConcurrentRunError: another call is under way.
        """
        if self._turns.mine:
            raise ConcurrentRunError(
                f"a run of {self._model_name} cannot begin or go on within one of its calls, as in a hook of the model"
            )
        if not self._turns.take(changes):
            raise ConcurrentRunError(
                f"{self._model_name} is in a call in another thread. Use one compiled model (and one "
                "pipeline) for each thread, or let the runs take turns"
            )
        keep_torch_state(changes)
