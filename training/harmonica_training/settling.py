"""Which of the schedules that a training comes by it settles on: the one whose images are best, measured.

The loss is a proxy, from other noise in each iteration, and a hard schedule changes in jumps. What it stands for can
be measured at the price of a run without gradients. So every second iteration that is done with the schedule of the
moment, and the best one is kept. Around the best, pairs of steps change places, nearest steps first, and what makes the
error smaller stays: no gradient shows that step 4 had better be computed than step 5, and the cost stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_training.validation import Validation

LOOK_EVERY = 2  # iterations between measurements of the schedule of the moment


@dataclass(frozen=True)
class Found:
    """A schedule and the router that it is of.

    Attributes:
        error: what it makes of the final latents, see `Validation.image_error`.
        computes: bool `[steps, sites]`.
        logits: of the router, `[steps, sites]`.
    """

    error: float
    computes: NDArray[np.bool_]
    logits: Tensor

    def exchanged(self, a: int, b: int, validation: Validation) -> Found:
        """The same with steps `a` and `b` in each other's place."""
        order = np.arange(len(self.computes))
        order[[a, b]] = b, a
        computes = self.computes[order]
        return Found(validation.image_error(computes), computes, self.logits[torch.from_numpy(order)])


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
            error = self._validation.image_error(computes)
            if self.best is None or error < self.best.error:
                self._keep(Found(error, computes.copy(), logits.cpu()))
        left = self._exchanges
        while self.best is not None and left and self._vain < len(self._pairs):
            a, b = self._pairs[self._next]
            self._next = (self._next + 1) % len(self._pairs)
            self._vain += 1
            if np.array_equal(self.best.computes[a], self.best.computes[b]):
                continue
            left -= 1
            other = self.best.exchanged(a, b, self._validation)
            if other.error < self.best.error:
                self._keep(other)

    def _keep(self, found: Found) -> None:
        self.best = found
        self._vain = 0

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, beside `values`."""
        if self.best is None:
            return {}
        return {"best.computes": torch.from_numpy(self.best.computes), "best.logits": self.best.logits}

    def values(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps, beside `tensors`."""
        return {"error": self.best.error if self.best else None, "next": self._next, "vain": self._vain}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, float | int | None]) -> None:
        """Take over `tensors` and `values`."""
        self._next, self._vain = int(values["next"] or 0), int(values["vain"] or 0)
        if (error := values["error"]) is not None:
            self.best = Found(float(error), tensors["best.computes"].numpy(), tensors["best.logits"])
