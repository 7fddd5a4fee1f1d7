"""The timesteps and steps of a run, as its scheduler is set to them.

A run may skip its first steps (image-to-image does): then it takes the last rows of a schedule for all steps, or a
schedule for only the remaining ones.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import torch

from harmonica_rt.engine import RunKey
from harmonica_rt.errors import ScheduleMismatchError
from harmonica_rt.indices import StepIndex

HINT = "compile with on_other_steps='resample' to resample a schedule for other numbers of steps"


@dataclass(frozen=True)
class RunTimesteps:
    """The timesteps of a run: the scheduler's own tensor `[steps]` (or its end), and a copy of it on the CPU."""

    own: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, scheduler: Any, first: int = 0) -> RunTimesteps | None:
        """The timesteps that `scheduler` is set to, from index `first` on; None if it has none.

        The copy waits for the GPU, once per run.
        """
        own = getattr(scheduler, "timesteps", None)
        if not isinstance(own, torch.Tensor) or own.dim() != 1:
            return None
        return cls(own[first:], own[first:].cpu())

    @property
    def key(self) -> tuple[float, ...]:
        """The values of the timesteps, to compare runs by."""
        return tuple(self.known.tolist())

    def belongs_to_another(self, timestep: Any, step: int) -> bool:
        """Whether `timestep` belongs to a step other than `step`. False when in doubt.

        A value on a GPU could only be fetched by waiting for it. But pipelines step with elements of the scheduler's
        own tensor, and the address of an element gives its index.
        """
        known = self.known
        if step >= len(known):
            return False
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                return False
            if timestep.device.type == "cpu":
                timestep = timestep.item()
            else:
                index = self.position(timestep)
                return index is not None and bool(known[index] != known[step])
        if not isinstance(timestep, (int, float)) or float(known[step]) == timestep:
            return False
        return bool((known == timestep).any())

    def position(self, timestep: torch.Tensor) -> int | None:
        """The index of a tensor that is an element of the scheduler's tensor; None if it has its own memory."""
        own = self.own
        if timestep.dtype != own.dtype or timestep.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        index, rest = divmod(int(timestep.storage_offset() - own.storage_offset()), max(own.stride(0), 1))
        return index if rest == 0 and 0 <= index < len(own) else None


def timesteps_are_set(scheduler: Any) -> bool:
    """Whether timesteps were set for sampling. A new diffusers scheduler has none, or all its training timesteps."""
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is not None:
        return timesteps is not None
    return len(timesteps) != getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)


@dataclass(frozen=True)
class RunSteps:
    """The steps of a schedule that one run of a scheduler takes.

    Attributes:
        first: the step that it begins with.
        timesteps: the timesteps of the schedule's steps; None if the scheduler has none.
        training_steps: the scheduler's number of training steps, the largest timestep of most schedulers.
    """

    first: StepIndex
    timesteps: RunTimesteps | None
    training_steps: float

    @classmethod
    def of(cls, scheduler: Any, expected: int) -> RunSteps:
        """The steps of the run that `scheduler` is set to, under a schedule for `expected` steps.

        Raises:
            ScheduleMismatchError: the scheduler is set to another number of steps.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        training_steps = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
        if timesteps is None:
            return cls(StepIndex(0), None, training_steps)
        asked, left_out = steps_of(scheduler) or (0, 0)
        if expected == asked:
            return cls(StepIndex(left_out), RunTimesteps.of(scheduler), training_steps)
        if expected == asked - left_out:
            return cls(StepIndex(0), RunTimesteps.of(scheduler, left_out), training_steps)
        raise ScheduleMismatchError(_mismatch(type(scheduler).__name__, expected, asked, left_out))

    @property
    def key(self) -> RunKey | None:
        """The key of the run, equal for runs that are alike; None if the scheduler has no timesteps."""
        return RunKey(self.timesteps.key, self.first) if self.timesteps is not None else None


def steps_of(scheduler: Any) -> tuple[int, int] | None:
    """How many timesteps a scheduler is set to, and how many of them its run skips; None if it has no timesteps.

    Image-to-image tells its scheduler how many first steps it skips with `set_begin_index`.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Sized):
        return None
    return len(timesteps), int(getattr(scheduler, "begin_index", None) or 0)


def _mismatch(scheduler: str, expected: int, asked: int, left_out: int) -> str:
    if left_out:
        left = asked - left_out
        return (
            f"the schedule is for {expected} steps, but the pipeline asked for {asked} and runs the last {left} of "
            f"them ({scheduler} counts model evaluations). Use a schedule for {asked}, of which the last {left} steps "
            f"are used, or one for {left}; {HINT}"
        )
    return (
        f"the schedule is for {expected} steps, but the pipeline asked for {asked} ({scheduler} counts {asked} model "
        f"evaluations per run). Use a schedule for {asked}, or pass num_inference_steps so that {scheduler} makes "
        f"{expected} steps; {HINT}"
    )
