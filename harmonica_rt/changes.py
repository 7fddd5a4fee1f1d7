"""Temporary changes and exclusive turns, undone however their block ends, even if it is interrupted at any line.

Hazard: an exception may arise between any two lines (Ctrl-C, a debugger, a signal handler that raises), even within
cleanup code. `try: change() finally: undo()` leaves damage if the first line of `finally` is interrupted, and so does a
context manager made from a generator if `contextlib` itself is interrupted. So every change is recorded before it is
made, undoing twice is harmless, and a block undoes twice:

    changes = Changes()
    with changes, changes:  # twice: the first may be interrupted while it undoes
        changes.set(model.__dict__, "forward", other)
        ...
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

_ABSENT: Any = object()


class Changes:
    """A record of changes and how to undo them. The end of a `with` block undoes them, the last change first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, held: dict[str, Any], name: str, value: Any) -> None:
        """Set `held[name]` to `value` until undone; if others have changed it since, their value stays."""
        self.undone_by(functools.partial(_put_back, held, name, held.get(name, _ABSENT), value))
        held[name] = value

    def remove(self, held: dict[str, Any], name: str) -> None:
        """Remove `held[name]` until undone; if others have set it since, their value stays."""
        self.undone_by(functools.partial(_put_back, held, name, held.get(name, _ABSENT), _ABSENT))
        held.pop(name, None)

    def undone_by(self, undo: Callable[[], object]) -> None:
        """Register `undo` before its change is made. It may run twice, or without the change having been made."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Undo all changes."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _put_back(held: dict[str, Any], name: str, before: Any, value: Any) -> None:
    if held.get(name, _ABSENT) is not value:
        return
    if before is _ABSENT:
        held.pop(name, None)
    else:
        held[name] = before


def in_this_thread(call: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `call` in the current thread, and `elsewhere` in all others."""
    thread = threading.get_ident()

    @functools.wraps(call)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (call if threading.get_ident() == thread else elsewhere)(*args, **kwargs)

    return either


class _Turn:
    """One call's turn; a new object per call, so that calls are told apart by identity."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Turns:
    """A lock that one call holds at a time, and that neither an interrupted call nor a fork can leave locked."""

    def __init__(self) -> None:
        self._taken: dict[int, _Turn] = {}  # by process: an entry copied by a fork does not count in the child

    @property
    def mine(self) -> bool:
        """Whether a call of this thread has the turn, so that the caller runs within that call."""
        taken = self._taken.get(os.getpid())
        return taken is not None and taken.thread == threading.get_ident()

    def take(self, changes: Changes) -> bool:
        """Take the turn until `changes` are undone. False if another call has it."""
        process, mine = os.getpid(), _Turn()
        changes.undone_by(functools.partial(self._give_back, process, mine))
        return self._taken.setdefault(process, mine) is mine  # one atomic operation

    def _give_back(self, process: int, turn: object) -> None:
        if self._taken.get(process) is turn:
            self._taken.pop(process, None)
