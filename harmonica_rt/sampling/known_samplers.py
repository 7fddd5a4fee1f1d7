"""Remembers what the schedulers of the last runs compute, so that it is found out once and not in every run.

A scheduler counts as unchanged while its attributes are the very same objects, not written to. Nothing is compared by
value: its timesteps may lie on a device, and reading them would wait for the run before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harmonica_rt.sampling.linear_sampler import SchedulerRun, scheduler_run
from harmonica_rt.sampling.run_timesteps import steps_of

MAX_KNOWN = 4


class KnownSamplers:
    """The runs of the schedulers that were used last.

    Args:
        expected: the number of steps of the schedule for a run of a scheduler; see `ScheduleChoice.expected`.
    """

    def __init__(self, expected: Callable[[int, int], int]) -> None:
        self._expected = expected
        self._known: list[tuple[_Note, SchedulerRun]] = []  # the most recently used first

    def of(self, scheduler: Any, begin_index: int | None) -> SchedulerRun:
        """See `scheduler_run`."""
        note = _Note(scheduler, begin_index)
        found = next((found for known, found in self._known if known.same_as(note)), None)
        if found is None:
            asked, left_out = steps_of(scheduler) or (0, 0)
            steps = self._expected(asked, left_out if begin_index is None else begin_index)
            found = scheduler_run(scheduler, steps, begin_index)
        others = [entry for entry in self._known if entry[1] is not found]
        self._known = [(note, found), *others][:MAX_KNOWN]
        return found


class _Note:
    """What a scheduler is at one moment."""

    def __init__(self, scheduler: Any, begin_index: int | None) -> None:
        self._begin_index = begin_index
        self._held = {"": type(scheduler), **getattr(scheduler, "__dict__", {})}
        tensors = [value for value in self._held.values() if isinstance(value, torch.Tensor)]
        self._told = not any(tensor.is_inference() for tensor in tensors)  # writes to those leave no trace
        self._versions = [tensor._version for tensor in tensors] if self._told else []

    def same_as(self, other: _Note) -> bool:
        return (
            self._told
            and other._told
            and self._begin_index == other._begin_index
            and self._held.keys() == other._held.keys()
            and all(value is other._held[name] for name, value in self._held.items())
            and self._versions == other._versions
        )
