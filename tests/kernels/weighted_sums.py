"""Random weighted sums, for the tests of every implementation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Caches per gate: of one gate, of some that are alike or not, and more than a group of the C++ loops or a launch takes
COUNTS = {
    "one": [1],
    "two": [2],
    "three": [3],
    "four": [4],
    "pairs": [2] * 9,
    "triples": [3, 3, 3],
    "fours": [4] * 5,
    "mixed": [1, 1, 2, 4, 3, 3, 2, 2, 2, 1],
}


class Sum(NamedTuple):
    """The arguments of `residual_reuse`."""

    x: Tensor
    caches: list[Tensor]
    gates: list[Tensor | None]
    weights: Tensor
    places: list[int]
    counts: list[int]

    @property
    def weighting(self) -> dict[str, Any]:
        """What the operators take by name."""
        return {"weights": self.weights, "places": self.places, "counts": self.counts}

    def exact(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The sum as it is written on paper, in PyTorch's operators on `dtype`."""
        numbers = self.weights.to(dtype).flatten().tolist()
        left = iter(zip(self.caches, self.places, strict=True))
        total = self.x.to(dtype)
        for gate, count in zip(self.gates, self.counts, strict=True):
            terms = [c.to(dtype) * (1.0 if p < 0 else numbers[p]) for c, p in itertools.islice(left, count)]
            total = total + torch.stack(terms).sum(0) * (1.0 if gate is None else gate.to(dtype))
        return total


def draw(shape: tuple[int, ...], dtype: torch.dtype, counts: Sequence[int]) -> Sum:
    """Gates are [B, 1, ..., D], None and [D] in turn; every fifth cache has no weight, others have any of 24."""
    caches = sum(counts)
    x, *others = torch.randn(caches + 1, *shape).to(dtype).unbind()
    per_batch = torch.randn(*shape[:1], *(1,) * (len(shape) - 2), *shape[1:][-1:]).to(dtype)
    kinds = [per_batch, None, torch.randn(shape[-1]).to(dtype)]
    gates = [kinds[k % 3] for k in range(len(counts))]
    places = [-1 if k % 5 == 4 else (7 * k + 1) % 24 for k in range(caches)]
    return Sum(x, others, gates, 2 * torch.randn(6, 4), places, list(counts))


def cancelling(shape: tuple[int, ...], dtype: torch.dtype) -> Sum:
    """An extrapolation of two values that hardly differ, by weights that no half type holds: 40.29 and -39.27."""
    value = torch.randn(shape)
    caches = [(value + 0.01 * torch.randn(shape)).to(dtype) for _ in range(2)]
    return Sum(torch.zeros(shape, dtype=dtype), caches, [None], torch.tensor([[40.29, -39.27]]), [0, 1], [2])
