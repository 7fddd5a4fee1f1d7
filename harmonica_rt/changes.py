"""Changes that last for a while, and turns that are taken: undone whatever ends the while, at whatever line.

Hazard: an exception may come between any two lines (Ctrl-C, a debugger, a signal handler that raises), also within the
code that cleans up. `try: change() finally: undo()` leaves damage where the first line of `finally` is interrupted, and
a context manager made from a generator leaves it where `contextlib` itself is. So what is changed is written down
before it is changed, undoing twice does no harm, and a block undoes twice:

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
    """What has been changed, and how it is undone: the last change first, when a `with` block of it ends."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, held: dict[str, Any], name: str, value: Any) -> None:
        """Let `held[name]` be `value` for a while, or until somebody else makes it something else, which stays."""
        self.undone_by(functools.partial(_put_back, held, name, held.get(name, _ABSENT), value))
        held[name] = value

    def remove(self, held: dict[str, Any], name: str) -> None:
        """Let there be no `held[name]` for a while, or until somebody else makes one, which stays."""
        self.undone_by(functools.partial(_put_back, held, name, held.get(name, _ABSENT), _ABSENT))
        held.pop(name, None)

    def undone_by(self, undo: Callable[[], object]) -> None:
        """Say what undoes a change, before it is made. `undo` may run twice, or where the change was not yet made."""
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
    """`call` in the thread that asks for this, `elsewhere` in all others."""
    thread = threading.get_ident()

    @functools.wraps(call)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (call if threading.get_ident() == thread else elsewhere)(*args, **kwargs)

    return either


class _Turn:
    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Turns:
    """One call at a time may have the turn. A lock that neither an interrupted call nor a fork can leave locked."""

    def __init__(self) -> None:
        self._taken: dict[int, _Turn] = {}  # by process: what a fork copies is not the child's

    @property
    def mine(self) -> bool:
        """Whether a call of this thread has the turn: what asks lies within that call."""
        taken = self._taken.get(os.getpid())
        return taken is not None and taken.thread == threading.get_ident()

    def take(self, changes: Changes) -> bool:
        """Take the turn until `changes` are undone. False if another call has it."""
        process, mine = os.getpid(), _Turn()
        changes.undone_by(functools.partial(self._give_back, process, mine))
        return self._taken.setdefault(process, mine) is mine  # one operation: it happens or it does not

    def _give_back(self, process: int, turn: object) -> None:
        if self._taken.get(process) is turn:
            self._taken.pop(process, None)
