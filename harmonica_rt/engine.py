"""The interfaces of engines and streams: anything that can run one step of a stream, normally or catching up.

`sampling` finds the run, the step and the stream of a call, over any engine. The engines are `PlannedEngine` (compiled
plans, in `execute`), `GraphEngine` (plans of dynamo's graphs, in `backend`), `ReferenceEngine`, and in `parity`
`LockstepEngine` (compiled beside the reference) and `HigherEngine` (the reference in the next higher precision).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from harmonica_rt.call.call import Call
from harmonica_rt.errors import ArgumentError
from harmonica_rt.indices import StepIndex
from harmonica_rt.schedule import Schedule


class RunKey(NamedTuple):
    """What two runs must have in common to count as alike.

    Runs that are alike are expected to give the model the same timesteps: one forecasts the next (`execute.forecast`).

    Attributes:
        timesteps: one per step of the schedule, as held by the scheduler that drives the run.
        first: the step that the run begins with; image-to-image skips those before it.
    """

    timesteps: tuple[float, ...]
    first: StepIndex = StepIndex(0)

    @classmethod
    def of(cls, timesteps: object) -> RunKey:
        """The key of a run over all steps of a schedule with these timesteps.

        Raises:
            ArgumentError: not a flat list, array or tensor of finite numbers.
        """
        expected = "timesteps is a list, array or tensor of finite numbers, one per step"
        if isinstance(timesteps, torch.Tensor | np.ndarray):
            if timesteps.ndim != 1 or getattr(timesteps, "is_meta", False):
                raise ArgumentError(f"{expected}; got one of shape {tuple(timesteps.shape)}")
            timesteps = timesteps.tolist()  # waits for a device once, not once per value
        if isinstance(timesteps, str | bytes) or not isinstance(timesteps, Iterable):
            raise ArgumentError(f"{expected}; got {timesteps!r}")
        values = []
        for value in timesteps:
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ArgumentError(f"{expected}; one of them is {value!r}") from error
            if not math.isfinite(number):
                raise ArgumentError(f"{expected}; one of them is {number}")
            values.append(number)
        return cls(tuple(values))


class Stream(Protocol):
    """The cached features of one sequence of calls, one call per step, all with one signature."""

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """Run the denoiser for `step` and return what the model would.

        With `catch_up` nothing is reused and everything that later steps may read is stored anew.
        """

    def begin(self) -> None:
        """The next call has other conditioning: nothing kept from earlier calls is valid any more."""

    def end(self) -> None:
        """The run is over.

        Raises:
            RunError: an assumption that it was computed with turned out wrong.
        """


class Engine(Protocol):
    """Makes streams. Knows the model and the schedule."""

    @property
    def looks_late(self) -> bool:
        """Whether a step may start before the model is checked for changes, so that the device works meanwhile.

        If the model has changed, the caller discards the result and runs the step again.
        """

    def state(self, call: Call) -> object:
        """The model's current state, compared by identity: features stored in one state are never reused in another."""

    def begin_run(self, key: RunKey | None = None, schedule: Schedule | None = None) -> object | None:
        """A sampling run begins: all streams of the last one are over.

        Args:
            key: runs with equal keys are alike; None where no scheduler drives the run.
            schedule: what all streams of the run are under, of the same sites as before; None: as in the last run.

        Returns:
            The model's state at the end of the last run, for which the first step may start before the model is
            checked; None if it must be checked first.
        """

    def new_stream(self, call: Call) -> Stream:
        """A stream for calls with the signature of `call`, with nothing stored."""
