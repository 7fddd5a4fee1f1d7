"""The definition of `residual_reuse`, with which every other implementation is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_residual_sum


def residual_reuse_reference(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + sum_k w_k * (gates[k] * caches[k]), added up in the order of k; w_k = weights[places[k]], or 1.

    Arithmetic is fp32 for half types (fp64 for fp64), with one downcast at the end. Shapes, dtypes and errors are
    those of `harmonica_kernels.residual_reuse`.
    """
    check_residual_sum("residual_reuse", x, caches, gates, weights, places)
    return residual_sum(x, caches, gates, weights, places).to(x.dtype)


def residual_sum(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    """The sum in the dtype of the arithmetic, before the downcast: fp32, or fp64 for fp64; contiguous.

    Per k there is one multiplication by the gate, one by the weight and one addition, each rounded. In half types the
    product of gate and cache is exact in fp32, so the weight comes last.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = weights_at(weights, places, len(caches), wide)
    total = x.to(wide)
    for cache, gate, weight in zip(caches, gates, factors, strict=True):
        term = cache.to(wide) if gate is None else gate.to(wide) * cache.to(wide)
        total = total + (term if weight is None else weight * term)
    return total.contiguous()


def weights_at(
    weights: torch.Tensor | None, places: Sequence[int], count: int, dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """The weight of each of `count` caches, a tensor of one number; None for a factor of 1."""
    if weights is None:
        return [None] * count
    numbers = weights.reshape(-1).to(dtype)
    return [None if place < 0 else numbers[place] for place in places]
