"""Decides which calls belong to a run that `reset()` began, where no scheduler drives it."""

from __future__ import annotations

from harmonica_rt.errors import RunError
from harmonica_rt.sampling.frames import FrameMark, callers, own_function, suspendable_functions
from harmonica_rt.sampling.run import Run


class ByHand:
    """Decides which calls belong to a run that `reset()` began.

    Loops may alternate step by step, as generators and coroutines do, and a loop may end in the middle of its run:

    - A run that another one interrupted must not continue: no call may come from its loop until that calls `reset()`.
    - If a run interrupted another one, and its first call came from within the function that called `reset()`, all of
      its calls must come from there.
    - A function that called `reset()`, made two calls or more and returned in mid-run (after an error) has ended it.

    If `reset()` was called elsewhere (in a notebook cell, in a helper), nothing distinguishes the calls, and every call
    counts.
    """

    def __init__(self) -> None:
        self._began: FrameMark | None = None  # the function that began the current run
        self._within = True  # whether all calls of the run so far came from within that function
        self._calls = 0
        # That function, if the first call came from within it; else the generators and coroutines running at that call.
        self._loop: list[FrameMark] = []
        self._interrupts = False  # whether the run interrupted another one
        self._bound = False  # whether all calls of the run must come from within the function that began it
        self._left: list[FrameMark] = []  # the loops of interrupted runs, which may be suspended and come back

    def begins(self, before: Run | None) -> None:
        """`reset()` begins a run, whether or not the previous one finished."""
        self._interrupts = before is not None and not before.finished and not before.untouched
        if self._interrupts:
            self._left += self._loop
        self._left = [left for left in self._left if not left.gone and not left.is_on_stack()]
        frame = own_function()
        self._began = FrameMark(frame) if frame is not None else None
        self._loop, self._calls, self._within, self._bound = [], 0, True, False

    def makes_this_call(self, run: Run) -> bool:
        """Whether the current call is the run's.

        Raises:
            RunError: the run ended when its function returned.
        """
        began, here = self._began, False  # here: whether the call comes from within that function
        for frame in callers():
            if self._left and any(left.is_of(frame) for left in self._left):
                return False
            if began is not None and began.is_of(frame):
                here = True
                break
        if run.untouched:
            self._bound = here and self._interrupts
            self._loop = [began] if here and began is not None else suspendable_functions()
        elif not run.finished and self._calls > 1 and self._left_behind(here):
            raise RunError(
                f"the function that called reset() and made the calls of this run has returned, after {self._calls} "
                "calls. Call reset() before the next run; where several functions make the calls of one run, call "
                "reset() in the function that calls them"
            )
        self._calls, self._within = self._calls + 1, self._within and here
        return here or not self._bound or began is None or began.gone

    def _left_behind(self, here: bool) -> bool:
        """Whether all calls so far came from within a function that has since returned."""
        return self._within and not here and self._began is not None and not self._began.may_be_halted
