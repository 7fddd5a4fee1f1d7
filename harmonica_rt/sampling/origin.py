"""Who makes a call: the current run, or other code that uses the same model.

Nothing in a call says so. After an abandoned run, a training step or a metric may call the denoiser too, and must not
be mistaken for the run's next call. The stack tells them apart: calls of a run come from the function that began it.
That is the `__call__` of the pipeline or, in a hand-written loop, the function that set the timesteps. A run is over
when that function has returned; a call from elsewhere, or through a callback passed to the pipeline, is not the run's.
If a hand-written loop sets its timesteps in a function that returns before the first call, or at the top level of a
script, there is no such function, and every call counts as the run's.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from types import CodeType, FrameType
from typing import Any

from torch import nn

from harmonica_rt.model.identity import referent
from harmonica_rt.sampling.frames import FrameMark, callers, own_function, pipeline_frame, scheduler_of


class Origin:
    """The function that a run comes from.

    Args:
        scheduler: the scheduler that drives the run.
        seen: True if it is setting its timesteps now; False if it did so earlier and a call of the model is under way.
    """

    def __init__(self, scheduler: Any, *, seen: bool = True) -> None:
        frame = pipeline_frame(scheduler)
        self._in_pipeline = frame is not None
        if frame is None and seen:
            frame = own_function()
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
        """At the first call of the run, when the stack shows where it comes from, determine the run's function anew.

        One that set the timesteps and is not on the stack is not it: then it is a pipeline's `__call__`, or unknown.
        """
        if self._mark is None or not self._mark.is_on_stack():
            frame = pipeline_frame(scheduler)
            if frame is not None:
                self._in_pipeline, self._mark = True, FrameMark(frame)
            elif not self._in_pipeline:
                self._mark = None
        beneath: set[CodeType] = set()  # the functions between the run's and the call
        for frame in callers():
            if self._mark is not None and self._mark.is_of(frame):
                # A function passed to the pipeline is a callback, except where the run's first call comes through it.
                self._callbacks = _callbacks(frame) if self._in_pipeline else frozenset()
                self._callbacks -= beneath
                return
            beneath.add(frame.f_code)

    def distance(self, scheduler: Any) -> int | None:
        """How many functions lie between it and the current call; None if the call comes from elsewhere.

        A call through a pipeline with another scheduler, or through a callback, also comes from elsewhere.
        """
        beneath: list[CodeType] = []
        for frame in callers():
            if self._mark is not None and self._mark.is_of(frame):
                return len(beneath) if self._callbacks.isdisjoint(beneath) else None
            other = scheduler_of(frame)
            if other is not None and other is not scheduler:
                return None
            beneath.append(frame.f_code)
        return len(beneath) if self._mark is None else None


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
