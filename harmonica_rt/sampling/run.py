"""One sampling run: which step it is in, and which stream a call belongs to.

Calls are not steps. Guidance may call twice per step, skip-layer guidance a third time at some steps, and a callback
may shrink the batch in mid-run. So a call belongs to the k-th stream of its step with its signature and conditioning,
and each stream has its own slots. A stream reuses only what it stored itself at the step that the schedule names;
otherwise it computes everything and stores it again. That costs time in unusual runs; a stale feature would ruin the
image.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from harmonica_rt.call.call import Call, Signature
from harmonica_rt.engine import Engine, RunKey, Stream
from harmonica_rt.errors import ConcurrentRunError, RunError
from harmonica_rt.indices import StepIndex
from harmonica_rt.plan.liveness import sources
from harmonica_rt.sampling.conditioning import Conditioning
from harmonica_rt.sampling.notices import Notices
from harmonica_rt.schedule import Schedule

log = logging.getLogger(__name__)

_NOT_RUN = object()

MAX_STREAMS = 16  # per step; each has its own slots
MAX_IDLE_STREAMS = 3  # kept in case their conditioning returns; each has its own slots
MAX_IDLE_STATES = 3  # states of the model whose streams are kept in case the state returns


@dataclass
class RunStats:
    """Counts of what one run has done so far; `first` is the step that it began with."""

    calls: int = 0
    entries: int = 0
    reused: int = 0
    catch_ups: list[int] = field(default_factory=list)
    first: int = 0


class _StreamState:
    """A stream of the run, and the step at which each site that it holds was stored."""

    def __init__(self, stream: Stream, call: Call, order: int, tables: _Tables, model_state: object) -> None:
        self.stream = stream
        self.model_state = model_state  # the state that its features were computed with
        self.signature: Signature = call.signature
        self.last_step = -1
        self.conditioning = Conditioning(call)
        self._tables = tables
        self.begin(call, order)

    def begin(self, call: Call, order: int) -> None:
        """Discard everything stored: `call` is the first with new conditioning."""
        self.conditioning.end()
        self.order = order
        self.stream.begin()
        self.conditioning = Conditioning(call)
        self._regular = self.last_step == -1  # it has run every step so far, as scheduled
        self._stored = np.full(self._tables.latest.shape[1], -1)  # the step of each site, if not regular

    def lacks_features(self, step: StepIndex, before: int) -> bool:
        """Whether `step` would reuse features that the stream, whose last step was `before`, does not hold."""
        if self._regular and before == step - 1:
            return False
        if self._regular:
            self._regular = False
            if before >= 0:
                self._stored = self._tables.latest[before].copy()
        reused = self._tables.reused[step]
        return bool((self._stored[reused] < self._tables.source[step, reused]).any())

    def spoil(self, before: int) -> None:
        """Discount its last step, which was run for a model that had changed; it continues after step `before`."""
        self.last_step = before
        self._regular = False
        self._stored[:] = -1

    def ran(self, step: StepIndex, *, all_sites: bool) -> None:
        """Record that it ran `step`, as scheduled or with all sites computed."""
        if not self._regular:
            self._stored[slice(None) if all_sites else self._tables.compute[step]] = step


@dataclass(frozen=True, eq=False)
class _Tables:
    """What a schedule says about each step.

    Attributes:
        compute: bool `[steps, sites]`.
        source: int `[steps, sites]`, the step whose value a reused site reads.
        latest: int `[steps, sites]`, the last step up to this one that computes the site.
        reused: indices of the sites that each step reuses.
    """

    compute: NDArray[np.bool_]
    source: NDArray[np.int64]
    latest: NDArray[np.int64]
    reused: tuple[NDArray[np.intp], ...]


@functools.lru_cache(maxsize=64)
def _tables_of(schedule: Schedule) -> _Tables:
    compute = schedule.compute
    steps = np.arange(len(compute))[:, None]
    latest = np.maximum.accumulate(np.where(compute, steps, -1), axis=0)
    return _Tables(compute, sources(compute), latest, tuple(np.flatnonzero(~row) for row in compute))


class Run:
    """A sampling run over one engine, from its first step to its last.

    Used by one thread: the one that began it or, with `any_thread`, the one that makes the first call.
    """

    def __init__(self, schedule: Schedule, engine: Engine, notices: Notices, *, any_thread: bool) -> None:
        self.step = StepIndex(0)
        self.stats = RunStats()
        self.failed = False
        self._schedule = schedule
        self._engine = engine
        self._tables = _tables_of(schedule)
        self._streams: list[_StreamState] = []
        self._model_state: object = None  # as the last call found it
        self._errors: list[RunError] = []  # of streams that were dropped
        self.calls_in_step = 0
        self._calls_before = 0  # in the last step
        self._changed_in: dict[str, StepIndex] = {}  # conditioning -> the step at which its value changed
        self._notices = notices
        self.thread = None if any_thread else threading.current_thread()
        self._timesteps = TimestepOrder()
        self.key: RunKey | None = None  # of the scheduler that drives it

    @property
    def first(self) -> StepIndex:
        """The step that it begins with."""
        return StepIndex(self.stats.first)

    def begin_at(self, step: StepIndex) -> None:
        """Skip the steps before this one. Only valid before the first call."""
        self.step = step
        self.stats.first = step

    @property
    def untouched(self) -> bool:
        """Whether no call has come yet."""
        return self.stats.calls == 0

    @property
    def finished(self) -> bool:
        """Whether all steps of the schedule are over."""
        return self.step >= self._schedule.steps

    def check_thread(self) -> None:
        """Raise ConcurrentRunError in any thread other than the run's own."""
        if self.thread is None:
            self.thread = threading.current_thread()
        elif self.thread is not threading.current_thread():
            raise ConcurrentRunError(
                "another thread's sampling run is under way on this compiled model. Use one compiled model (and one "
                "pipeline) for each thread, or let the runs take turns"
            )

    def call(self, call: Call, *, counts_as_step: bool) -> object:
        """Run the denoiser for one call in the current step; if calls count as steps, the step ends with it."""
        if self.failed:
            raise RunError("an earlier step of this run failed; begin a new run (reset() does, or the pipeline's call)")
        if self.finished:
            raise RunError(
                f"the schedule is for {self._schedule.steps} steps and they are over. Call reset() before the next "
                f"run. {self.stats.calls} calls came, with {self._timesteps.moves + 1} timesteps: of a model compiled "
                "by itself each call is a step. Where a step takes several calls (guidance), make them one call with a "
                "larger batch, or compile an object of a class of your own that has the model as `transformer` and the "
                "scheduler as `scheduler`: then set_timesteps begins a run and step ends a step"
            )
        _check_no_gradient(call)
        self._timesteps.check(call, self.step)
        self.failed = True  # until the call is over: if anything interrupts it, the run must not continue
        output = self._call(call)
        if counts_as_step:
            self.advance()
        self.failed = False
        return output

    def advance(self) -> None:
        """End the current step.

        Raises:
            RunError: it was the last step, and the run's result turned out to be wrong.
        """
        self.step = StepIndex(self.step + 1)
        self._calls_before, self.calls_in_step = self.calls_in_step, 0
        if self.finished and (errors := self._end()):
            raise errors[0]

    def go_back(self) -> None:
        """Return to the last step, which was not over yet. Only valid before the first call of a step."""
        self.step = StepIndex(self.step - 1)
        self.calls_in_step = self._calls_before

    def abandon(self) -> None:
        """End the run before its last step. Its result is not used, so its errors are only logged."""
        for error in self._end():
            log.warning("a run that was not finished: %s", error)
        self._streams.clear()

    def _end(self) -> list[RunError]:
        return [*self._errors, *_ended(self._streams)]

    def _call(self, call: Call) -> object:
        if self.untouched:
            self._engine.begin_run(self.key)  # now, not when the run began: the model may have changed since
        if self._engine.looks_late and self._model_state is not None:
            output = self._early(call, self._model_state)
            if output is not _NOT_RUN:
                return output
        self._model_state = self._engine.state(call)
        state, before = self._stream_for(call, self._model_state)
        catch_up = state.lacks_features(self.step, before)
        with torch.no_grad():
            output = state.stream.run(self.step, call, catch_up=catch_up)
        return self._done(state, output, catch_up=catch_up)

    def _early(self, call: Call, model_state: object) -> object:
        """Run the call for the last known state of the model and check it afterwards; `_NOT_RUN` if it changed."""
        state, before = self._stream_for(call, model_state)
        catch_up = state.lacks_features(self.step, before)
        try:
            with torch.no_grad():
                output = state.stream.run(self.step, call, catch_up=catch_up)
        except Exception:  # ignored if the step ran for an outdated state of the model; otherwise raised
            if self._engine.state(call) is model_state:
                raise
        else:
            if self._engine.state(call) is model_state:
                return self._done(state, output, catch_up=catch_up)
        state.spoil(before)
        self.calls_in_step -= 1
        return _NOT_RUN

    def _done(self, state: _StreamState, output: object, *, catch_up: bool) -> object:
        if catch_up:
            log.warning("step %d is computed in full: its stream has no features from an earlier step", self.step)
            self.stats.catch_ups.append(self.step)
        else:
            self.stats.reused += len(self._tables.reused[self.step])
        state.ran(self.step, all_sites=catch_up)
        self.stats.entries += len(self._schedule.sites)
        self.stats.calls += 1
        return output

    def _stream_for(self, call: Call, model_state: object) -> tuple[_StreamState, int]:
        """The stream of a model state that continues with `call`, and its last step before this one."""
        order = self.calls_in_step
        self.calls_in_step += 1
        open_streams = [
            s
            for s in self._streams
            if s.last_step != self.step and s.signature == call.signature and s.model_state is model_state
        ]
        open_streams.sort(key=lambda s: (s.order != order, s.order))
        state = next((s for s in open_streams if s.conditioning.recognises(call)), None)
        if state is None:
            state = self._stream_by_values(call, order, open_streams, model_state)
        before = state.last_step
        state.last_step = self.step
        return state, before

    def _stream_by_values(
        self, call: Call, order: int, open_streams: list[_StreamState], model_state: object
    ) -> _StreamState:
        """As `_stream_for`, when no stream recognises the call: compares values, which waits for the device."""
        changed = {id(s): s.conditioning.changed(call) for s in open_streams}
        state = next((s for s in open_streams if not changed[id(s)]), None)
        if state is not None:
            state.conditioning.advance(call)
            return state
        before = next((s for s in open_streams if s.last_step == self.step - 1), None)
        if before is not None:
            self._note_changes(changed[id(before)])
        if len(open_streams) >= MAX_IDLE_STREAMS:
            state = min(open_streams, key=lambda s: s.last_step)
            state.begin(call, order)
            return state
        return self._open_stream(call, order, model_state)

    def _note_changes(self, names: list[str]) -> None:
        """Warn if the same arguments change at every step: then nothing can ever be reused."""
        again = [name for name in names if self._changed_in.get(name) == self.step - 1]
        self._changed_in.update(dict.fromkeys(names, self.step))
        if again:
            self._notices.say(
                "arguments that change",
                "%s changes from step to step. By its name it belongs to the request (as a prompt does), so each "
                "change begins a new request and nothing is reused across it: pass the same values in every step of a "
                "run. Arguments that move with the latents are known by names such as noisy_..., timesteps by names "
                "such as ..._timestep",
                ", ".join(again),
            )

    def _open_stream(self, call: Call, order: int, model_state: object) -> _StreamState:
        for other in self._streams:
            if other.last_step == self.step - 1 and (changed := call.plain_difference(other.signature)):
                log.warning(
                    "%s changes from step to step: each value makes a plan and a stream of its own, and nothing is "
                    "reused across them. Pass numbers that change as tensors",
                    changed,
                )
        state = _StreamState(self._engine.new_stream(call), call, order, self._tables, model_state)
        self._streams = [*self._of_recent_states(model_state), state]
        return state

    def _of_recent_states(self, model_state: object) -> list[_StreamState]:
        """All streams except those of model states that were left long ago: each stream has its own slots."""
        recent = dict.fromkeys(id(s.model_state) for s in sorted(self._streams, key=lambda s: -s.last_step))
        kept = {id(model_state), *list(recent)[:MAX_IDLE_STATES]}
        self._errors += _ended(s for s in self._streams if id(s.model_state) not in kept)
        return [s for s in self._streams if id(s.model_state) in kept]


def _check_no_gradient(call: Call) -> None:
    """Raise RunError if the caller could expect the result to carry a gradient."""
    if not torch.is_grad_enabled():
        return
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            raise RunError(
                f"{path} requires a gradient, and the results of a compiled model carry none. Call it under "
                "torch.no_grad(), pass a detached tensor, or use the plain model (uncompile the pipeline)"
            )


def _ended(streams: Iterable[_StreamState]) -> list[RunError]:
    """End every stream, even if another one fails, since each learns from the run; return the errors."""
    errors = []
    for end in (end for state in streams for end in (state.conditioning.end, state.stream.end)):
        try:
            end()
        except RunError as error:
            errors.append(error)
    return errors


class TimestepOrder:
    """Detects a run that restarts unannounced, by timesteps that move backwards.

    A run that restarts moves back by at least its largest move; a sampler may move back by less (the timesteps of
    ancestral KDPM2 do, by rounding). Reads only timesteps on the CPU: reading one from a GPU would wait for it.
    """

    def __init__(self) -> None:
        self.moves = 0  # steps whose timestep differed from the previous one
        self._last: float | None = None
        self._largest_move = 0.0
        self._step = -1

    def check(self, call: Call, step: StepIndex) -> None:
        """Raise RunError if the timestep moves back to where the run began, or towards it by a large move."""
        value = _timestep(call)
        if value is None or step == self._step:
            return
        if self._last is not None and value != self._last:
            move = value - self._last
            if move * self._largest_move < 0 and abs(move) >= abs(self._largest_move):
                raise RunError(
                    f"step {step} came with timestep {value:g} after {self._last:g}, against the order of this run: a "
                    "new run seems to have begun. Call reset() before each run; a pipeline's set_timesteps does it"
                )
            self.moves += 1
            if abs(move) > abs(self._largest_move):
                self._largest_move = move
        self._last, self._step = value, step


def _timestep(call: Call) -> float | None:
    for name in ("timestep", "timesteps", "t", "sigma"):
        value = call.kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel():
            return float(value.flatten()[0])
    return None
