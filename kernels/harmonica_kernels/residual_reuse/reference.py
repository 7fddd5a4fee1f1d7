"""The definition of `residual_reuse`, with which every other implementation is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from harmonica_kernels._checks import check_residual_sum


def residual_reuse_reference(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + sum_k gates[k] * y_k, added up in the order of k, where y_k is a weighted sum of counts[k] caches.

    Arithmetic is fp32 for half types (fp64 for fp64), with one downcast at the end. Shapes, dtypes and errors are
    those of `harmonica_kernels.residual_reuse`.
    """
    check_residual_sum("residual_reuse", x, caches, gates, weights, places, counts)
    return residual_sum(x, caches, gates, weights, places, counts).to(x.dtype)


def residual_sum(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> torch.Tensor:
    """The sum in the dtype of the arithmetic, before the downcast: fp32, or fp64 for fp64; contiguous.

    Every multiplication and every addition is rounded. A cache is multiplied by its weight first.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    terms = weighted(caches, weights, places, wide)
    total = x.to(wide)
    for gate, count in zip(gates, counts or [1] * len(gates), strict=True):
        y = summed([next(terms) for _ in range(count)])
        total = total + (y if gate is None else gate.to(wide) * y)
    return total.contiguous()


def weighted(
    caches: Sequence[torch.Tensor], weights: torch.Tensor | None, places: Sequence[int], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Each cache in `dtype`, multiplied by the weight at its place if it has one."""
    numbers = None if weights is None else weights.reshape(-1).to(dtype)
    for cache, place in zip(caches, places or [-1] * len(caches), strict=True):
        yield cache.to(dtype) if numbers is None or place < 0 else numbers[place] * cache.to(dtype)


def summed(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one term, in their order."""
    total, *others = terms
    for term in others:
        total = total + term
    return total
