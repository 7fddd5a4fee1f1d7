"""One sampling run: which step it is in, and how each of its calls runs.

Calls are not steps: a step may take several, and each belongs to a stream of its own (`streams`). A stream that lacks
features which the schedule reuses (`features`) computes everything and stores it again. That costs time in unusual
runs; a stale feature would ruin the image.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.engine import Engine, RunKey
from harmonica_rt.errors import ConcurrentRunError, RunError
from harmonica_rt.execute.sampler import RunsWhole, Sampler, WholeRun
from harmonica_rt.indices import StepIndex
from harmonica_rt.sampling.features import RunStream, step_tables
from harmonica_rt.sampling.gradients import check_no_gradient
from harmonica_rt.sampling.notices import Notices
from harmonica_rt.sampling.run_stats import RunStats
from harmonica_rt.sampling.schedule_choice import RunSchedule
from harmonica_rt.sampling.streams import RunStreams
from harmonica_rt.sampling.timestep_order import TimestepOrder

log = logging.getLogger(__name__)

_NOT_RUN = object()


@dataclass(slots=True)
class Position:
    """Where a run is: its step, the calls of that step so far, and those of the step before."""

    step: StepIndex
    calls: int = 0
    calls_before: int = 0

    def advance(self) -> None:
        """Go to the next step."""
        self.step = StepIndex(self.step + 1)
        self.calls_before, self.calls = self.calls, 0

    def go_back(self) -> None:
        """Return to the last step, which was not over yet. Only valid before the first call of a step."""
        self.step = StepIndex(self.step - 1)
        self.calls = self.calls_before


class Run:
    """A sampling run over one engine, from its first step to its last.

    Used by one thread: the one that began it or, with `any_thread`, the one that makes the first call.

    Attributes:
        position: its current step, and the calls in it.
        stats: counts of what it has done so far.
        failed: True if a call of it was interrupted or failed, so that it must not continue.
        thread: the thread that it belongs to; None if it has no call yet and any thread may make it.
        key: equal for runs that are alike, from the scheduler that drives it; None if none drives it.
    """

    def __init__(self, under: RunSchedule, engine: Engine, notices: Notices, *, any_thread: bool) -> None:
        self.position = Position(StepIndex(0))
        self.stats = RunStats(under)
        self.failed = False
        self.thread = None if any_thread else threading.current_thread()
        self.key: RunKey | None = None
        self._engine = engine
        self._tables = step_tables(under.schedule)
        self._streams = RunStreams(engine, self._tables, notices)
        self._model_state: object = None  # as the last call found it
        self._timesteps = TimestepOrder()

    @property
    def step(self) -> StepIndex:
        """The current step."""
        return self.position.step

    @property
    def first(self) -> StepIndex:
        """The step that it begins with."""
        return StepIndex(self.stats.first)

    def begin_at(self, step: StepIndex) -> None:
        """Skip the steps before this one. Only valid before the first call."""
        self.position.step = step
        self.stats.first = step

    @property
    def uncached(self) -> bool:
        """Whether the plain model makes its calls: `call_uncached`, not `call`."""
        return self.stats.under.uncached

    @property
    def untouched(self) -> bool:
        """Whether no call has come yet."""
        return self.stats.calls == 0

    @property
    def finished(self) -> bool:
        """Whether all steps of the schedule are over."""
        return self.position.step >= self._tables.steps

    def check_thread(self) -> None:
        """Raise ConcurrentRunError in any thread other than the run's own."""
        if self.thread is None:
            self.thread = threading.current_thread()
        elif self.thread is not threading.current_thread():
            raise ConcurrentRunError(
                "another thread's sampling run is under way on this compiled model. Use one compiled model (and one "
                "pipeline) for each thread, or let the runs take turns"
            )

    def call(self, call: Call, *, counts_as_step: bool, sampler: Sampler | None = None) -> object:
        """Run the denoiser for one call in the current step; if calls count as steps, the step ends with it.

        With a `sampler`, which takes the outputs of all steps from this one on, all of them may be run at once: then a
        `WholeRun` is returned.

        Raises:
            RunError: the run failed earlier or is finished, its timesteps move backwards, or the caller could expect a
                gradient.
        """
        self._check_goes_on()
        check_no_gradient(zip(call.paths, call.leaves, strict=True))
        self._timesteps.check(call, self.position.step)
        self.failed = True  # until the call is over: if anything interrupts it, the run must not continue
        output = self._call(call, sampler)
        if counts_as_step:
            self.advance()
        self.failed = False
        return output

    def call_uncached(self, forward: Callable[[], object], *, counts_as_step: bool) -> object:
        """One call of the plain model in the current step; see `call`.

        Raises:
            RunError: the run is finished.
        """
        self._check_goes_on()
        output = forward()
        self.stats.calls += 1
        self.stats.entries += self._tables.sites
        if counts_as_step:
            self.advance()
        return output

    def _check_goes_on(self) -> None:
        if self.failed:
            raise RunError("an earlier step of this run failed; begin a new run (reset() does, or the pipeline's call)")
        if self.finished:
            raise RunError(
                f"the {'run' if self.uncached else 'schedule'} is for {self._tables.steps} steps and they are over. "
                f"Call reset() before the next run. It took {self.stats.calls} calls, with "
                f"{self._timesteps.moves + 1} timesteps: each call of a model compiled by itself is a step. Where a "
                "step takes several calls (guidance), make them one call with a larger batch, or compile an object of "
                "a class of your own that has the model as `transformer` and the scheduler as `scheduler`: then "
                "set_timesteps begins a run and step ends a step"
            )

    def advance(self) -> None:
        """End the current step.

        Raises:
            RunError: it was the last step, and the run's result turned out to be wrong.
        """
        self.position.advance()
        if self.finished and (errors := self._streams.end()):
            raise errors[0]

    def abandon(self) -> None:
        """End the run before its last step. Its result is not used, so its errors are only logged."""
        for error in self._streams.end():
            log.warning("a run that was not finished: %s", error)
        self._streams.drop()

    def _call(self, call: Call, sampler: Sampler | None) -> object:
        if self.untouched:
            # now, not when the run began: the model may have changed since
            self._model_state = self._engine.begin_run(self.key, self.stats.under.schedule)
        if self._engine.looks_late and self._model_state is not None:
            output = self._early(call, self._model_state, sampler)
            if output is not _NOT_RUN:
                return output
            if self.untouched:
                self._streams.drop()  # so that the memory of its stream serves the one for the new state
                self._engine.begin_run(self.key, self.stats.under.schedule)
        self._model_state = self._engine.state(call)
        stream, before = self._stream_for(call, self._model_state)
        catch_up = stream.lacks_features(self.position.step, before)
        output = self._run(stream, call, sampler, catch_up=catch_up)
        return self._done(stream, output, catch_up=catch_up)

    def _run(self, stream: RunStream, call: Call, sampler: Sampler | None, *, catch_up: bool) -> object:
        """Run the step or, where sampler and stream allow it, the whole run."""
        with torch.no_grad():
            if sampler is not None and isinstance(stream.stream, RunsWhole):
                latents = stream.stream.run_whole(call, sampler, catch_up=catch_up)
                if latents is not None:
                    return WholeRun(latents)
            return stream.stream.run(self.position.step, call, catch_up=catch_up)

    def _early(self, call: Call, model_state: object, sampler: Sampler | None) -> object:
        """Run the call for the last known state of the model, and then check whether that is still its state.

        Returns `_NOT_RUN` if it is not: the result is discarded, and the call has to run again.
        """
        stream, before = self._stream_for(call, model_state)
        catch_up = stream.lacks_features(self.position.step, before)
        try:
            output = self._run(stream, call, sampler, catch_up=catch_up)
        except Exception:  # ignored if the step ran for an outdated state of the model; otherwise raised
            if self._engine.state(call) is model_state:
                raise
        else:
            if self._engine.state(call) is model_state:
                return self._done(stream, output, catch_up=catch_up)
        stream.spoil(before)
        self.position.calls -= 1
        return _NOT_RUN

    def _stream_for(self, call: Call, model_state: object) -> tuple[RunStream, int]:
        position = self.position
        order = position.calls
        position.calls += 1
        return self._streams.stream_for(call, position.step, order, model_state)

    def _done(self, stream: RunStream, output: object, *, catch_up: bool) -> object:
        first, tables, stats = self.position.step, self._tables, self.stats
        steps = range(first, tables.steps if isinstance(output, WholeRun) else first + 1)
        if catch_up:
            log.warning("step %d is computed in full: its stream has no features from an earlier step", first)
            stats.catch_ups.append(first)
        stats.reused += sum(tables.reused[step] for step in steps[catch_up:])
        stream.ran(first, all_sites=catch_up)
        stats.entries += tables.sites * len(steps)
        stats.calls += len(steps)
        self.position.step = StepIndex(steps[-1])
        return output
