"""Chooses among the schedules that a training passes through: the one whose images are best, as measured.

The loss is a proxy, computed from different noise in each iteration, and a hard schedule changes in jumps. The image
error itself can be measured at the price of a run without gradients. So the current schedule is measured every second
iteration, and the best one is kept. In the best one, pairs of steps are swapped, nearest steps first, and a swap that
reduces the error is kept: no gradient shows that computing step 4 is better than step 5, and a swap leaves the number
of computed entries unchanged.
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

LOOK_EVERY = 2  # iterations between measurements of the current schedule
HOPELESS = 0.2  # difference in log error: a schedule that is worse than the best by more is not measured further
LARGEST_LOG = 700.0  # its exponential still fits a float


@dataclass(frozen=True)
class Found:
    """A schedule and the router that it comes from.

    Attributes:
        logs: logarithm of its image error, one per batch; see `Validation.logs`.
        computes: bool `[steps, sites]`.
        logits: logits of the router, `[steps, sites]`.
    """

    logs: tuple[float, ...]
    computes: NDArray[np.bool_]
    logits: Tensor

    @property
    def error(self) -> float:
        """See `Validation.image_error`."""
        return math.exp(statistics.fmean(self.logs))


class Settling:
    """Keeps the best schedule so far, and tries swaps in it.

    Args:
        validation: measures schedules.
        free: bool `[steps]`, the steps that may reuse.
        exchanges: number of swapped pairs to measure per iteration.
    """

    def __init__(self, validation: Validation, free: NDArray[np.bool_], exchanges: int) -> None:
        self._validation = validation
        self._exchanges = exchanges
        self._free = free
        steps = np.flatnonzero(free).tolist()
        self._pairs = sorted(combinations(steps, 2), key=lambda pair: (pair[1] - pair[0], pair))
        self._next = 0  # index of the next pair
        self._vain = 0  # pairs tried since a swap was last kept
        self.best: Found | None = None

    def follow(self, iteration: int, computes: NDArray[np.bool_], logits: Tensor) -> None:
        """Measure the current schedule if it is due, then try swaps in the best one.

        Args:
            iteration: number of iterations done.
            computes: the current schedule, bool `[steps, sites]`.
            logits: logits of the router, `[steps, sites]`.
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
        """Measure a schedule as long as it may still be the best; if it is, keep it."""
        logs: list[float] = []
        for log in self._validation.logs(computes):
            logs.append(log)
            if self.best and statistics.fmean(logs) > statistics.fmean(self.best.logs[: len(logs)]) + HOPELESS:
                return
        if self.best is None or statistics.fmean(logs) < statistics.fmean(self.best.logs):
            self.best = Found(tuple(logs), computes, logits)
            self._vain = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps."""
        if self.best is None:
            return {}
        return {"best.computes": torch.from_numpy(self.best.computes), "best.logits": self.best.logits}

    def values(self) -> dict[str, Any]:
        """The plain values that a checkpoint keeps."""
        return {"logs": list(self.best.logs) if self.best else None, "next": self._next, "vain": self._vain}

    def load(self, tensors: Mapping[str, Tensor], values: object) -> None:
        """Restore `tensors` and `values` from a checkpoint.

        Raises:
            CheckpointError: they are not what `tensors` and `values` return.
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
