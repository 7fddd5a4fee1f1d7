"""Runs that were under way when another one began, and must not continue as if they were the current one.

Two threads, or two loops that take turns step by step (as generators do), would take each other's features. A run that
was abandoned for good is harmless, so a displaced run only counts while the function that it comes from can continue.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from harmonica_rt.errors import ConcurrentRunError
from harmonica_rt.sampling.current_run import CurrentRun
from harmonica_rt.sampling.origin import Origin


class DisplacedRuns:
    """The runs that others displaced in one session.

    A run is recognised when it continues: by its thread, if another thread's run displaced it, and otherwise by the
    function that it comes from. If that function is unknown, only its scheduler is left to recognise it by.
    """

    def __init__(self) -> None:
        self._suspended: list[tuple[Origin, Any]] = []  # the origins of runs that may continue, and their schedulers
        # Threads whose pipeline run was interrupted when another thread began one, with the origin of the interrupted
        # run. Keys are thread objects, since identifiers are reused.
        self._threads: weakref.WeakKeyDictionary[threading.Thread, Origin | None] = weakref.WeakKeyDictionary()

    def suspend(self, current: CurrentRun, scheduler: Any, origin: Origin) -> None:
        """A scheduler is about to begin a run with this origin: remember the current run if it may continue."""
        before = current.run
        if before is not None and not before.finished and current.origin is not None:
            by_scheduler = not current.origin.known and scheduler is not current.scheduler and not before.untouched
            if current.origin.suspended or by_scheduler:
                self._suspended.append((current.origin, current.scheduler))
        self._suspended = [
            (other, driver)
            for other, driver in self._suspended
            if not (other.over or other.same(origin) or (driver is scheduler and not other.known))
        ]

    def forget_suspended(self) -> None:
        """No scheduler is followed any more, so none can continue a run."""
        self._suspended.clear()

    def interrupt(self, thread: threading.Thread, origin: Origin | None) -> None:
        """The run of a thread, with this origin, was interrupted by another thread's."""
        self._threads[thread] = origin

    def readmit(self, thread: threading.Thread) -> None:
        """The thread begins a run of its own."""
        self._threads.pop(thread, None)

    def check_call(self, current: CurrentRun) -> None:
        """Raise ConcurrentRunError if a call or step comes from a run that was displaced, not from the current one."""
        thread = threading.current_thread()
        if thread in self._threads:
            displaced = self._threads[thread]
            if displaced is None or not displaced.over:
                raise ConcurrentRunError(
                    "another thread began a sampling run on this compiled model before this thread's was over. Use one "
                    "compiled model (and one pipeline) for each thread, or let the runs take turns"
                )
            del self._threads[thread]
        if not self._suspended:
            return
        # Where the functions of several runs are on the stack, the innermost one makes the call.
        origin = current.origin
        own = origin.distance(current.scheduler) if origin is not None and current.run is not None else None
        for other, scheduler in self._suspended:
            distance = other.distance(scheduler) if other.known else None
            if distance is not None and (own is None or distance < own):
                raise interleaved()

    def check_step(self, current: CurrentRun, scheduler: Any) -> None:
        """Raise ConcurrentRunError if a displaced run, known only by its scheduler, continues during another run.

        The calls of both were counted as the latter's, so neither can be trusted.
        """
        run = current.run
        if run is None or run.untouched or (current.origin is not None and current.origin.over):
            return
        if any(one is scheduler and not origin.known for origin, one in self._suspended):
            run.failed = True
            raise interleaved()


def interleaved() -> ConcurrentRunError:
    """The error for a run that continues after another one began."""
    return ConcurrentRunError(
        "a sampling run continued after another had begun on this compiled model: two loops take turns step by step "
        "(as generators do), and would take each other's features. Finish one before the other begins, or use a "
        "compiled model for each"
    )
