"""Turns Ctrl-C, SIGTERM and SIGHUP into one exception, so that a command can save its work before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(stop: KeyboardInterrupt) -> int:
    """The status that a shell reports for a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def raised() -> Iterator[None]:
    """Within this block, the first signal raises `Stopped`; a Ctrl-C after it ends the process at once.

    Signals that the process was started to ignore (`nohup`, a background job) stay ignored.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in _ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in _ENDING:
        if signal.getsignal(other) is _stop:
            # A launcher may send SIGTERM after the terminal sent SIGINT; the second must not stop the saving.
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
    raise Stopped(number)
