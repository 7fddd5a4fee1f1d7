"""Whether a forward draws from the random generators of Python and numpy that the whole process shares.

Their states tell that somebody drew while it ran, which may have been another thread. Whether this thread drew from
Python's, a profiler sees; that slows a trace down, so it is asked only where a state has changed. Nothing tells for
numpy's: where it changes during a second trace as well, the model is taken to draw.
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
from harmonica_rt.model.hidden_state import Told
from harmonica_rt.model.walk import SHARED_GENERATOR

_ONLY_TELL = ("getstate", "__getstate__", "__reduce__")


class SharedDraws:
    """What forwards draw while a model is captured. What they drew is put back when `changes` are undone.

    Attributes:
        unsure: somebody drew during a forward that was not watched.
        watching: calls of forwards are looked at from now on.
        drew: a forward that was watched did.
        drew_last: the last forward was watched, and did.
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
        """`forward`, which notes here whether it draws."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.drew_last = False
            python, numpy, changes = random.getstate(), Told(np.random.get_state()), Changes()
            with changes, changes:
                if self.watching:
                    changes.undone_by(_going_on(sys.getprofile()))
                    sys.setprofile(self._look_at)
                changes.undone_by(lambda: self._compare(python, numpy))
                return forward(*args, **kwargs)

        return run

    def _compare(self, python: object, numpy: Told) -> None:
        of_numpy = Told(np.random.get_state()) != numpy
        if not self.watching:
            self.unsure = self.unsure or of_numpy or random.getstate() != python
        elif of_numpy:
            self.drew = self.drew_last = True

    def _look_at(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            name, owner = called.__name__, getattr(called, "__self__", None)
        elif event == "call" and frame.f_code.co_filename == random.__file__:  # of its methods, not all draw in C
            name, owner = frame.f_code.co_name, frame.f_locals.get("self")
        else:
            return
        if owner is SHARED_GENERATOR and name not in _ONLY_TELL:
            self.drew = self.drew_last = True


def _going_on(profiler: Any) -> Callable[[], object]:
    """What lets a thread's profiler go on after another one took its place."""
    if profiler is None or callable(profiler):
        return functools.partial(sys.setprofile, profiler)
    return profiler.enable  # type: ignore[no-any-return]  # cProfile's, which is no function
