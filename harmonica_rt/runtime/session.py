"""Which run a call of a denoiser belongs to, and which of its steps.

One call at a time, one run at a time. A run begins with `reset()`, or, for a pipeline's denoiser, when its scheduler
sets timesteps; it moves on with every call, or with every scheduler step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harmonica_rt.capture.alone import keep_torch_state
from harmonica_rt.capture.call import Call
from harmonica_rt.changes import Changes, Turns
from harmonica_rt.errors import ConcurrentRunError, RunError, ScheduleMismatchError
from harmonica_rt.indices import StepIndex
from harmonica_rt.runtime.engine import Engine, RunKey
from harmonica_rt.runtime.following import Following, calling_scheduler
from harmonica_rt.runtime.run import Run, RunStats
from harmonica_rt.runtime.scheduler import RunTimesteps, steps_left_out
from harmonica_rt.schedule import Schedule

log = logging.getLogger(__name__)


class Session:
    """The runs of one model under one schedule, over any engine.

    Args:
        model_name: its class, for messages.
        schedule: what to reuse when.
        engine: makes the streams of a run.

    Attributes:
        undone_by: the call that takes it out of a pipeline, for messages.
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
        self._timesteps: RunTimesteps | None = None  # of the current run
        self._warned_outside = False
        self._displaced: set[int] = set()  # threads in whose pipeline run another thread began its own

    def reset(self, timesteps: Sequence[float] | torch.Tensor | None = None) -> None:
        """Begin a new run: the next call is step 0. A pipeline's denoiser does it by itself.

        Args:
            timesteps: of the run, one per step of the schedule, in any scale and on any device; tells that it is like
                earlier runs of equal ones. On a GPU, where comparing timesteps would wait for the device, only runs
                that say so compute timestep work beforehand.

        Raises:
            ScheduleMismatchError: another number of timesteps than the schedule has steps.
            ArgumentError: something else than numbers.
        """
        key = None if timesteps is None else RunKey.of(timesteps, self.schedule.steps)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._begin().key = key

    @property
    def stats(self) -> RunStats | None:
        """What the current run did so far, or the last one where none is under way."""
        return self._run.stats if self._run is not None and not self._run.untouched else self.last_stats

    # ---- in a pipeline

    @property
    def pipelines(self) -> list[Any]:
        """The pipelines it is in; none for a model by itself, or where they are no more."""
        return self._following.pipelines

    def attach(self, pipeline: Any) -> None:
        """Let the pipeline's scheduler begin the runs and count the steps; looked up anew at every call.

        There may be several pipelines; then the scheduler whose run began last drives it.
        """
        self._following.add(pipeline)

    def leave(self, pipeline: Any) -> None:
        """Follow this pipeline's scheduler no more."""
        self._following.leave(pipeline)

    def detach(self) -> None:
        """Leave all schedulers alone again; runs begin with `reset()`."""
        self._following.release()
        self._scheduler = self._run = None

    def run_begins(self, scheduler: Any) -> None:
        """A scheduler sets its timesteps: whatever run there was is over, finished or not."""
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            self._begin()
            self._scheduler = scheduler

    def step_begins(self, scheduler: Any, timestep: Any) -> None:
        """The scheduler is stepped: with the timestep of this step, and by the thread whose run it is."""
        self._check_not_displaced()
        run = self._run
        if run is None or run.finished or scheduler is not self._scheduler:
            return
        run.check_thread()
        if run.untouched:
            return
        if self._timesteps is not None and self._timesteps.belongs_to_another(timestep, run.step):
            run.failed = True
            raise RunError(
                f"step {run.step} was stepped with timestep {float(timestep):g}, which belongs to another step: this "
                "run leaves steps out, and its scheduler was not told. Where image-to-image begins at step k, call "
                "scheduler.set_begin_index(k) before the first step; with a scheduler that has none, or for a run that "
                "leaves out steps in its midst, uncompile the pipeline"
            )

    def step_ends(self, scheduler: Any) -> None:
        """The step is over."""
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            run = self._run
            if run is None or run.untouched or run.finished or scheduler is not self._scheduler:
                return
            run.advance()
            if run.finished:
                self.last_stats, self._run = run.stats, None

    # ---- inside

    def _call(self, call: Call, uncached: Callable[[], Any]) -> Any:
        """One call of the denoiser; `uncached` is what runs in its place outside of a pipeline's runs."""
        if self._following:
            return self._call_in_pipeline(call, uncached)
        run = self._run or self._begin()
        run.check_thread()
        return run.call(call, counts_as_step=True)

    def _call_in_pipeline(self, call: Call, uncached: Callable[[], Any]) -> Any:
        caller, replaced = calling_scheduler(), self._following.replaced()
        begun = [scheduler for scheduler in replaced if caller is None or caller is scheduler]
        if begun:
            self._begin()
            self._scheduler = begun[-1]
        self._check_not_displaced()
        run = self._run
        if run is None or (caller is not None and caller is not self._scheduler):
            self._warn_outside_run()
            return uncached()
        run.check_thread()
        if run.untouched:
            self._set_out(run)
        return run.call(call, counts_as_step=False)

    def _warn_outside_run(self) -> None:
        if not self._warned_outside:
            log.warning(
                "%s was called outside a sampling run (its pipeline's scheduler set no timesteps, or is that of a "
                "pipeline that was not compiled): nothing is cached",
                self._model_name,
            )
            self._warned_outside = True

    def _set_out(self, run: Run) -> None:
        """Before the first call of a run: which steps of the schedule are its own, and what timesteps they have.

        A run that leaves out its first steps goes by the last rows of a schedule for all steps, or by a schedule for
        those that are left.
        """
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None:
            self._timesteps = None
            return
        asked, expected = len(timesteps), self.schedule.steps
        left_out = steps_left_out(self._scheduler)
        whole = expected == asked
        if not whole and expected != asked - left_out:
            raise ScheduleMismatchError(self._mismatch(asked, left_out))
        run.begin_at(StepIndex(left_out if whole else 0))
        self._timesteps = RunTimesteps.of(self._scheduler, 0 if whole else left_out)
        run.key = RunKey(self._timesteps.key, run.first) if self._timesteps is not None else None

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
            f"evaluations a run). Use a schedule for {asked}, or pass num_inference_steps so that {name} makes "
            f"{expected} steps"
        )

    def _begin(self) -> Run:
        current = threading.get_ident()
        if self._run is not None and not self._run.untouched:
            self.last_stats = self._run.stats
            if not self._run.finished:
                self._run.abandon()
            owner = self._run.thread
            if self._following and owner is not None and owner != current:
                self._displaced.add(owner)
        self._displaced.discard(current)
        self._run = Run(self.schedule, self.engine, any_thread=not self._following)
        return self._run

    def _check_not_displaced(self) -> None:
        if threading.get_ident() in self._displaced:
            raise ConcurrentRunError(
                "another thread began a sampling run on this compiled model before this thread's was over. Use one "
                "compiled model (and one pipeline) for each thread, or let the runs take turns"
            )

    def _enter(self, changes: Changes) -> None:
        """Let nobody else in until `changes` are undone; torch's state of the thread is then as it is now.

        Raises:
            ConcurrentRunError: another call is under way.
        """
        if not self._turns.take(changes):
            raise ConcurrentRunError(
                f"{self._model_name} is in a call in another thread. Use one compiled model (and one "
                "pipeline) for each thread, or let the runs take turns"
            )
        keep_torch_state(changes)
