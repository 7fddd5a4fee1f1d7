"""How far a compiled step may be from the reference: measured, not guessed.

Exact: equal bit for bit, as `plain` must be on CPU. Measured: against the reference run in the next higher precision
(fp64 for fp32, fp32 for half), the RMS and the largest error of the compiled output may each be at most twice that of
the eager model in the same dtype, with a floor of one ulp.

Hazard: the largest of a few hundred heavy-tailed errors is a matter of luck. In 3 of 300 calls of the bundled model
(2 x 512 values each), the eager model run sample by sample exceeded twice its own largest error; its RMS stayed within
1.4 times. So the ratio of the largest error to the RMS is learned from all calls of a run, not from one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 2.0


@dataclass(frozen=True)
class Error:
    """The RMS and the largest absolute difference of two tensors."""

    rms: float
    largest: float

    @classmethod
    def between(cls, a: torch.Tensor, b: torch.Tensor) -> Error:
        """The error of `a - b`, in fp64. NaN on only one side counts as infinite."""
        x, y = a.detach().to(torch.float64), b.detach().to(torch.float64)
        difference = (x - y).abs()
        difference = torch.where(x.isnan() & y.isnan(), 0.0, difference.nan_to_num(nan=torch.inf, posinf=torch.inf))
        difference = torch.where(x == y, 0.0, difference)
        if difference.numel() == 0:
            return cls(0.0, 0.0)
        return cls(float(difference.square().mean().sqrt()), float(difference.max()))

    def within(self, limit: Error) -> bool:
        """Whether neither figure is above its limit."""
        return self.rms <= limit.rms and self.largest <= limit.largest


NONE = Error(0.0, 0.0)  # the limit where no error is allowed


def worst(errors: list[Error]) -> Error:
    """The maximum of each figure."""
    return Error(max((e.rms for e in errors), default=0.0), max((e.largest for e in errors), default=0.0))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and bits are equal (NaN equals NaN, 0.0 differs from -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


class Allowance:
    """The error allowed for one output over the calls of a run, learned from the eager model's errors in them."""

    def __init__(self) -> None:
        self._peak = 0.0  # maximum so far of a call's largest eager error / RMS error

    def learn(self, eager: torch.Tensor, higher: torch.Tensor) -> Error:
        """The error of the eager output; the limits of this and later calls take it into account."""
        error = Error.between(eager, higher)
        if error.rms > 0:
            self._peak = max(self._peak, error.largest / error.rms)
        return error

    def limit(self, eager: torch.Tensor, higher: torch.Tensor) -> Error:
        """The error allowed for an output whose eager version is `eager` and whose ground truth is `higher`."""
        error = self.learn(eager, higher)
        truth = higher.detach().to(torch.float64)
        if eager.dtype is torch.uint8:  # one level of an image: which way it rounds is a matter of luck
            return Error(max(FACTOR * error.rms, 1.0), max(FACTOR * error.largest, 1.0))
        ulp = torch.finfo(eager.dtype).eps if eager.dtype.is_floating_point else 0.0
        size_rms = float(truth.square().mean().sqrt()) if truth.numel() else 0.0
        size_largest = float(truth.abs().max()) if truth.numel() else 0.0
        largest = self._peak * error.rms if error.rms < torch.inf else torch.inf
        return Error(max(FACTOR * error.rms, ulp * size_rms), max(FACTOR * largest, ulp * size_largest))


def limit_from(eager: torch.Tensor, higher: torch.Tensor) -> Error:
    """The error allowed when there is only one call to learn from."""
    return Allowance().limit(eager, higher)


def one_up(dtype: torch.dtype) -> torch.dtype:
    """The next higher precision, in which outputs of `dtype` are judged."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64
