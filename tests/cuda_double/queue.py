"""Launches that wait to run, and the order in which they do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

_KEYS = ("ADInplaceOrView", "AutogradCPU", "AutogradOther", "AutocastCPU")


class Launch:
    """What one launch does, and the launches that it comes after."""

    __slots__ = ("after", "done", "run", "then", "waits_for")

    def __init__(self, run: Callable[[], object], after: list[Launch]) -> None:
        self.run = run
        self.after = after
        self.waits_for = len(after)
        self.then: list[Launch] = []
        self.done = False
        for other in after:
            other.then.append(self)


class Queue:
    """Runs launches as late as it may: none before the host waits for it, and no others than it waits for.

    Args:
        seed: of the order in which it runs those that need not come one after the other.
        faults: takes a message for each launch that fails.
    """

    def __init__(self, seed: int, faults: list[str]) -> None:
        self._faults = faults
        self.lock = threading.RLock()
        self._random = random.Random(seed)
        self._pending: dict[Launch, None] = {}

    def add(self, run: Callable[[], object], after: Iterable[Launch]) -> Launch:
        """One more launch."""
        launch = Launch(run, [other for other in after if not other.done])
        self._pending[launch] = None
        return launch

    def run_all(self) -> None:
        """Run all launches."""
        self._run(set(self._pending))

    def run_until(self, last: Iterable[Launch]) -> None:
        """Run these launches and what they come after."""
        needed, todo = set[Launch](), list(last)
        while todo:
            launch = todo.pop()
            if not launch.done and launch not in needed:
                needed.add(launch)
                todo += launch.after
        self._run(needed)

    def _run(self, needed: set[Launch]) -> None:
        ready = [launch for launch in self._pending if launch in needed and not launch.waits_for]
        with as_on_a_device():
            while ready:
                place = self._random.randrange(len(ready))
                launch, ready[place] = ready[place], ready[-1]
                ready.pop()
                ready += self._finish(launch, needed)

    def _finish(self, launch: Launch, needed: set[Launch]) -> list[Launch]:
        """Run a launch; those that waited for it alone."""
        del self._pending[launch]
        launch.done = True
        for other in launch.then:
            other.waits_for -= 1
        freed = [other for other in launch.then if not other.waits_for and other in needed]
        run, launch.run, launch.then, launch.after = launch.run, _nothing, [], []
        try:
            run()
        except IndexError as error:  # a GPU would stop; here what the launch was to write stays NaN
            self._faults.append(f"a launch indexes out of bounds: {error}")
        return freed


def _nothing() -> None:
    pass


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Within this block nothing of the host's state shows: no mode, no autocast, no gradients, no versions."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for key in _KEYS:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    with _disable_current_modes(), torch._C._ExcludeDispatchKeyGuard(keys):
        yield
