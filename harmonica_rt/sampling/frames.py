"""Finds functions on the stack: the one that makes a call, a pipeline's `__call__`, one that was marked before.

A frame cannot be weakly referenced, and holding one would keep alive everything that its function and its callers hold.
Its address does not identify it either, since memory is reused. So a mark is put among the frame's local variables, as
debuggers do; it is freed with the frame.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

_MARK = "_harmonica_run"
_HALTED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_LIBRARIES = ("harmonica_rt", "diffusers", "torch", "contextlib")  # whose functions are never the user's own loop


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
        return any(map(self.is_of, callers()))


def callers() -> Iterator[FrameType]:
    """The frames on the stack, outwards from the module that asks: its own frames are left out."""
    frame: FrameType | None = sys._getframe(1)
    asking = frame.f_globals if frame is not None else None
    while frame is not None and frame.f_globals is asking:
        frame = frame.f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling_objects() -> Iterator[Any]:
    """The objects whose `__call__` is running, innermost first."""
    return (found for frame in callers() if (found := _called_object(frame)) is not None)


def calling_scheduler() -> Any | None:
    """The scheduler of the pipeline that makes the current call; None for a hand-written loop."""
    return next((found for frame in callers() if (found := scheduler_of(frame)) is not None), None)


def calling_pipeline(is_held: Callable[[object], bool], calling: Iterable[Any]) -> Any | None:
    """The first of the `calling` objects that is a pipeline with an attribute for which `is_held` is true."""
    for caller in calling:
        if _scheduler_in(caller) is not None and any(map(is_held, vars(caller).values())):
            return caller
    return None


def _called_object(frame: FrameType) -> Any | None:
    """The object whose `__call__` a frame runs."""
    code = frame.f_code
    return frame.f_locals.get("self") if code.co_name == "__call__" and code.co_varnames[:1] == ("self",) else None


def _scheduler_in(pipeline: Any) -> Any | None:
    scheduler = getattr(pipeline, "__dict__", {}).get("scheduler")
    return scheduler if callable(getattr(scheduler, "set_timesteps", None)) else None


def scheduler_of(frame: FrameType) -> Any | None:
    """The pipeline's scheduler, if the frame is a pipeline's `__call__`; else None."""
    return _scheduler_in(_called_object(frame))


def pipeline_frame(scheduler: Any) -> FrameType | None:
    """The frame of the innermost `__call__` of a pipeline with this scheduler; None if there is none."""
    return next((frame for frame in callers() if scheduler_of(frame) is scheduler), None)


def own_function() -> FrameType | None:
    """The frame of the running user function; None at the top level of a script."""
    for frame in callers():
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES:
            return frame if frame.f_code.co_flags & inspect.CO_OPTIMIZED else None
    return None


def suspendable_functions() -> list[FrameMark]:
    """Marks of the user's generators and coroutines that are running.

    No others are marked: before Python 3.13, looking at a frame's variables keeps them alive until the frame returns.
    """
    marks: list[FrameMark] = []
    for frame in callers():
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES and frame.f_code.co_flags & _HALTED:
            marks.append(FrameMark(frame))
    return marks
