"""Which of the schedules that a training comes by it settles on: the one whose images are best, measured.

The loss is a proxy, from other noise in each iteration, and a hard schedule changes in jumps. What it stands for can
be measured at the price of a run without gradients. So every second iteration that is done with the schedule of the
moment, and the best one is kept. Around the best, pairs of steps change places, nearest steps first, and what makes the
error smaller stays: no gradient shows that step 4 had better be computed than step 5, and the cost stays as it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_rt.untrusted.text import quoted
from harmonica_training.errors import CheckpointError
from harmonica_training.validation import Validation

LOOK_EVERY = 2  # iterations between measurements of the schedule of the moment
HOPELESS = (
    0.2  # of the log of an error: worse than the best by so much after some batches, the others are not looked at
)
LARGEST_LOG = 700.0  # whose exponential a float still holds


@dataclass(frozen=True)
class Found:
    """A schedule and the router that it is of.

    Attributes:
        logs: logarithm of what it makes of the final latents, one per batch, see `Validation.logs`.
        computes: bool `[steps, sites]`.
        logits: of the router, `[steps, sites]`.
    """

    logs: tuple[float, ...]
    computes: NDArray[np.bool_]
    logits: Tensor

    @property
    def error(self) -> float:
        """See `Validation.image_error`."""
        return math.exp(statistics.fmean(self.logs))


class Settling:
    """The best schedule so far.

    Args:
        validation: measures schedules.
        free: bool `[steps]`, the steps that may reuse.
        exchanges: measurements of exchanged pairs an iteration.
    """

    def __init__(self, validation: Validation, free: NDArray[np.bool_], exchanges: int) -> None:
        self._validation = validation
        self._exchanges = exchanges
        self._free = free
        steps = np.flatnonzero(free).tolist()
        self._pairs = sorted(combinations(steps, 2), key=lambda pair: (pair[1] - pair[0], pair))
        self._next = 0  # of the pairs
        self._vain = 0  # pairs tried since an exchange was kept
        self.best: Found | None = None

    def follow(self, iteration: int, computes: NDArray[np.bool_], logits: Tensor) -> None:
        """Measure what `iteration` came to, if it is its turn, then exchange around the best.

        Args:
            iteration: iterations done.
            computes: the schedule of the moment, bool `[steps, sites]`.
            logits: the router's.
        """
        if iteration % LOOK_EVERY == 0 and not (self.best and np.array_equal(computes, self.best.computes)):
            self._try(computes.copy(), logits.cpu())
        left = self._exchanges
        while self.best is not None and left and self._vain < len(self._pairs):
            a, b = self._pairs[self._next]
            self._next = (self._next + 1) % len(self._pairs)
            self._vain += 1
            if np.array_equal(self.best.computes[a], self.best.computes[b]):
                continue
            left -= 1
            order = np.arange(len(computes))
            order[[a, b]] = b, a
            self._try(self.best.computes[order], self.best.logits[torch.from_numpy(order)])

    def _try(self, computes: NDArray[np.bool_], logits: Tensor) -> None:
        """Measure a schedule for as long as it may turn out the best; if it does, keep it."""
        logs: list[float] = []
        for log in self._validation.logs(computes):
            logs.append(log)
            if self.best and statistics.fmean(logs) > statistics.fmean(self.best.logs[: len(logs)]) + HOPELESS:
                return
        if self.best is None or statistics.fmean(logs) < statistics.fmean(self.best.logs):
            self.best = Found(tuple(logs), computes, logits)
            self._vain = 0

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, beside `values`."""
        if self.best is None:
            return {}
        return {"best.computes": torch.from_numpy(self.best.computes), "best.logits": self.best.logits}

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps, beside `tensors`."""
        return {"logs": list(self.best.logs) if self.best else None, "next": self._next, "vain": self._vain}

    def load(self, tensors: Mapping[str, Tensor], values: object) -> None:
        """Take over `tensors` and `values`.

        Raises:
            CheckpointError: they are not what `tensors` and `values` give.
        """
        match values:
            case {"logs": list() | None as logs, "next": int(number), "vain": int(vain), **rest} if (
                not rest and 0 <= number < max(len(self._pairs), 1) and 0 <= vain <= len(self._pairs)
            ):
                self._next, self._vain = number, vain
            case _:
                raise CheckpointError(f"settling: expected logs, next and vain, got {quoted(values)}")
        if logs is None:
            return
        if not logs or not all(type(log) in (int, float) and abs(log) < LARGEST_LOG for log in logs):
            raise CheckpointError(f"settling: expected logs of errors, one per batch, got {quoted(logs)}")
        if missing := {"best.computes", "best.logits"} - tensors.keys():
            raise CheckpointError(f"settling: {', '.join(sorted(missing))} is missing")
        computes = tensors["best.computes"].numpy()
        if not computes[~self._free].all():
            raise CheckpointError("settling: best.computes reuses at a step that must compute")
        self.best = Found(tuple(logs), computes, tensors["best.logits"])
