"""Who makes a call: the current run, or other code that uses the same model.

Nothing in a call says so. After an abandoned run, a training step or a metric may call the denoiser too, and must not
be mistaken for the run's next call. The stack tells them apart: calls of a run come from the function that began it.
That is the `__call__` of the pipeline or, in a hand-written loop, the function that set the timesteps. A run is over
when that function has returned; a call from elsewhere, or through a callback passed to the pipeline, is not the run's.
If a hand-written loop sets its timesteps in a function that returns before the first call, or at the top level of a
script, there is no such function, and every call counts as the run's.

A frame cannot be weakly referenced, and holding one would keep alive everything that its function and its callers hold.
Its address does not identify it either, since memory is reused. So a mark is put among the frame's local variables, as
debuggers do; it is freed with the frame.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

from harmonica_rt.errors import RunError
from harmonica_rt.model.walk import referent
from harmonica_rt.sampling.run import Run

_MARK = "_harmonica_run"
_HALTED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_LIBRARIES = ("harmonica_rt", "diffusers", "torch", "contextlib")  # their functions only help to set timesteps


class _Mark:
    __slots__ = ("__weakref__",)


class FrameMark:
    """Identifies a frame without keeping it alive."""

    def __init__(self, frame: FrameType) -> None:
        mark = frame.f_locals.get(_MARK)
        if mark is None:
            mark = frame.f_locals[_MARK] = _Mark()
        self._mark = weakref.ref(mark)
        self._code = frame.f_code

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrameMark) and not self.gone and self._mark() is other._mark()

    __hash__ = None  # type: ignore[assignment]

    @property
    def gone(self) -> bool:
        """Whether its function has returned."""
        return self._mark() is None

    @property
    def may_be_halted(self) -> bool:
        """Whether its function can resume after leaving the stack: a generator or coroutine that has not finished."""
        return bool(self._code.co_flags & _HALTED) and not self.gone

    def is_of(self, frame: FrameType) -> bool:
        """Whether `frame` is the marked frame."""
        return frame.f_code is self._code and not self.gone and frame.f_locals.get(_MARK) is self._mark()

    def is_on_stack(self) -> bool:
        """Whether its function is running, in this frame or further up the stack."""
        return any(map(self.is_of, _callers()))


class Origin:
    """The function that a run comes from.

    Args:
        scheduler: the scheduler that drives the run.
        seen: True if it is setting its timesteps now; False if it did so earlier and a call of the model is under way.
    """

    def __init__(self, scheduler: Any, *, seen: bool = True) -> None:
        frame = _pipeline_frame(scheduler)
        self._in_pipeline = frame is not None
        if frame is None and seen:
            frame = _own_function()
        self._mark = FrameMark(frame) if frame is not None else None
        self._callbacks: frozenset[CodeType] = frozenset()

    @property
    def known(self) -> bool:
        """Whether the function that began the run is known."""
        return self._mark is not None

    @property
    def suspended(self) -> bool:
        """Whether its function is neither finished nor on the stack: a generator, or a function of another thread."""
        return self._mark is not None and not self._mark.gone and not self._mark.is_on_stack()

    def same(self, other: Origin) -> bool:
        """Whether both are the same call of the same function."""
        return self._mark is not None and other._mark is not None and self._mark == other._mark

    @property
    def over(self) -> bool:
        """Whether its function has returned, so that no further call can be the run's."""
        return self._mark is not None and self._mark.gone

    def settle(self, scheduler: Any) -> None:
        """Settle the frame at the first call of the run, when it is known where that call comes from."""
        if self._mark is None or not self._mark.is_on_stack():
            frame = _pipeline_frame(scheduler)
            if frame is not None:
                self._in_pipeline, self._mark = True, FrameMark(frame)
            elif not self._in_pipeline:
                self._mark = None
        beneath: set[CodeType] = set()
        for frame in _callers():
            if self._mark is not None and self._mark.is_of(frame):
                # If the first call comes through a function that was passed in, so does the run itself.
                self._callbacks = _callbacks(frame) if self._in_pipeline else frozenset()
                self._callbacks -= beneath
                return
            beneath.add(frame.f_code)

    def distance(self, scheduler: Any) -> int | None:
        """How many functions lie between it and the current call; None if the call comes from elsewhere.

        A call through a pipeline with another scheduler, or through a callback, also comes from elsewhere.
        """
        beneath: list[CodeType] = []
        for frame in _callers():
            if self._mark is not None and self._mark.is_of(frame):
                return len(beneath) if self._callbacks.isdisjoint(beneath) else None
            other = _scheduler_of(frame)
            if other is not None and other is not scheduler:
                return None
            beneath.append(frame.f_code)
        return len(beneath) if self._mark is None else None


class ByHand:
    """Decides which calls belong to a run that `reset()` began.

    Loops may alternate step by step, as generators and coroutines do: a run that was interrupted by another while its
    loop was suspended must not continue. If a run interrupted another one, and its first call came from within the
    function that called `reset()`, all of its calls must come from there. A function that called `reset()`, made the
    calls, and was left in the middle of them (by an error) has ended its run. If `reset()` was called elsewhere (in a
    notebook cell, in a helper), nothing distinguishes the calls, and every call counts.
    """

    def __init__(self) -> None:
        self._began: FrameMark | None = None  # the function that began the current run
        self._within = True  # whether all calls so far came from within it
        self._calls = 0
        self._loop: list[FrameMark] = []  # may be suspended: what ran at the first call, or what began the run
        self._bound = self._broke_off = False
        self._left: list[FrameMark] = []  # functions whose runs were interrupted while they were suspended

    def begins(self, before: Run | None) -> None:
        """`reset()` begins a run, whether or not the previous one finished."""
        self._broke_off = before is not None and not before.finished and not before.untouched
        if self._broke_off:
            self._left += self._loop
        self._left = [left for left in self._left if not left.gone and not left.is_on_stack()]
        frame = _own_function()
        self._began = FrameMark(frame) if frame is not None else None
        self._loop, self._calls, self._within, self._bound = [], 0, True, False

    def makes_this_call(self, run: Run) -> bool:
        """Whether the current call is the run's.

        Raises:
            RunError: the run ended when its function returned.
        """
        began, here = self._began, False
        for frame in _callers():
            if any(left.is_of(frame) for left in self._left):
                return False
            if began is not None and began.is_of(frame):
                here = True
                break
        if run.untouched:
            self._bound = here and self._broke_off
            self._loop = [began] if here and began is not None else _may_be_halted()
        elif not run.finished and self._calls > 1 and self._left_behind(here):
            raise RunError(
                f"the function that called reset() and made the calls of this run has returned, after {self._calls} "
                "calls. Call reset() before the next run; where several functions make the calls of one run, call it "
                "in the one that calls those"
            )
        self._calls, self._within = self._calls + 1, self._within and here
        return here or not self._bound or began is None or began.gone

    def _left_behind(self, here: bool) -> bool:
        """Whether all calls so far came from within a function that has since returned."""
        return self._within and not here and self._began is not None and not self._began.may_be_halted


def calling_objects() -> Iterator[Any]:
    """The objects whose `__call__` is running, innermost first."""
    return (found for frame in _callers() if (found := _called_object(frame)) is not None)


def calling_scheduler() -> Any | None:
    """The scheduler of the pipeline that makes the current call; None for a hand-written loop."""
    return next((found for frame in _callers() if (found := _scheduler_of(frame)) is not None), None)


def calling_pipeline(is_held: Callable[[object], bool], callers: Iterable[Any]) -> Any | None:
    """The first of `callers` that is a pipeline with an attribute for which `is_held` is true."""
    for caller in callers:
        if _scheduler_in(caller) is not None and any(map(is_held, vars(caller).values())):
            return caller
    return None


def _callers() -> Iterator[FrameType]:
    """The frames on the stack, outwards from the one that called this module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is not globals():
            yield frame
        frame = frame.f_back


def _called_object(frame: FrameType) -> Any | None:
    """The object whose `__call__` a frame runs."""
    code = frame.f_code
    return frame.f_locals.get("self") if code.co_name == "__call__" and code.co_varnames[:1] == ("self",) else None


def _scheduler_in(pipeline: Any) -> Any | None:
    scheduler = getattr(pipeline, "__dict__", {}).get("scheduler")
    return scheduler if callable(getattr(scheduler, "set_timesteps", None)) else None


def _scheduler_of(frame: FrameType) -> Any | None:
    """The pipeline's scheduler, if the frame is a pipeline's `__call__`; else None."""
    return _scheduler_in(_called_object(frame))


def _pipeline_frame(scheduler: Any) -> FrameType | None:
    return next((frame for frame in _callers() if _scheduler_of(frame) is scheduler), None)


def _own_function() -> FrameType | None:
    """The frame of the running user function; None at the top level of a script."""
    for frame in _callers():
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES:
            return frame if frame.f_code.co_flags & inspect.CO_OPTIMIZED else None
    return None


def _may_be_halted() -> list[FrameMark]:
    """Marks of the user's generators and coroutines that are running.

    No others are marked: before Python 3.13, reading a frame's variables keeps them alive until the frame returns.
    """
    marks: list[FrameMark] = []
    for frame in _callers():
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES and frame.f_code.co_flags & _HALTED:
            marks.append(FrameMark(frame))
    return marks


def _callbacks(frame: FrameType) -> frozenset[CodeType]:
    """The code objects of the functions that were passed to a running function."""
    code, variables = frame.f_code, frame.f_locals
    extra = sum(bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + extra]
    passed: list[Any] = []
    for value in (variables.get(name) for name in names if name != "self"):
        if type(value) in weakref.ProxyTypes:
            value = referent(value)
        passed += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
    return frozenset(found for value in passed if (found := _code_of(value)) is not None)


def _code_of(value: Any) -> CodeType | None:
    while isinstance(value, functools.partial):
        value = value.func
    if not callable(value) or isinstance(value, type):
        return None
    ways = (type(value).forward,) if issubclass(type(value), nn.Module) else (value, type(value).__call__)
    for function in ways:
        code = getattr(inspect.unwrap(function), "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None
