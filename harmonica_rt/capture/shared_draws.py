"""Detects a forward that draws from the process-wide random generators of Python and numpy.

A change of their states shows that something drew while the forward ran, but that may have been another thread. For
Python's generator, a profiler shows whether this thread drew; it slows a trace down, so it is used only after a state
has changed. For numpy's there is no such means: if its state changes during a second trace too, the model is assumed
to draw.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from harmonica_rt.changes import Changes
from harmonica_rt.model.hidden_state import SHARED_GENERATOR, StateAsText

_DRAW_NOTHING = ("getstate", "__getstate__", "__reduce__")  # methods of the generator


class SharedDraws:
    """Notes whether forwards draw while a model is captured; if one did, undoing `changes` restores the generators.

    Attributes:
        unsure: True if a generator advanced during an unwatched forward, in whichever thread.
        watching: set to True to watch the forwards that follow.
        drew: True if any watched forward drew.
        drew_last: True if the last forward was watched and drew.
    """

    def __init__(self, changes: Changes) -> None:
        self.unsure = self.watching = self.drew = self.drew_last = False
        python, numpy = random.getstate(), np.random.get_state()

        def put_back() -> None:
            if self.drew:
                random.setstate(python)
                np.random.set_state(numpy)

        changes.undone_by(put_back)

    def noting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, recording in this object whether it draws."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.drew_last = False
            python, numpy, changes = random.getstate(), StateAsText(np.random.get_state()), Changes()
            with changes, changes:
                if self.watching:
                    changes.undone_by(_reinstating(sys.getprofile()))
                    sys.setprofile(self._profile)
                changes.undone_by(lambda: self._compare(python, numpy))
                return forward(*args, **kwargs)

        return run

    def _compare(self, python: object, numpy: StateAsText) -> None:
        of_numpy = StateAsText(np.random.get_state()) != numpy
        if not self.watching:
            self.unsure = self.unsure or of_numpy or random.getstate() != python
        elif of_numpy:
            self.drew = self.drew_last = True

    def _profile(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            name, owner = called.__name__, getattr(called, "__self__", None)
        elif event == "call" and frame.f_code.co_filename == random.__file__:  # some methods are in Python
            name, owner = frame.f_code.co_name, frame.f_locals.get("self")
        else:
            return
        if owner is SHARED_GENERATOR and name not in _DRAW_NOTHING:
            self.drew = self.drew_last = True


def _reinstating(profiler: Any) -> Callable[[], object]:
    """A function that reinstates a thread's profiler after another one took its place."""
    if profiler is None or callable(profiler):
        return functools.partial(sys.setprofile, profiler)
    return profiler.enable  # type: ignore[no-any-return]  # cProfile's, which is not a function
