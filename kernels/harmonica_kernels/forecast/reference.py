"""The definition of `forecast`, with which every other implementation is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_dtype, check_same, check_weights
from harmonica_kernels.residual_reuse.reference import summed, weighted

_OP = "forecast"


def forecast_reference(caches: Sequence[torch.Tensor], weights: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """out = sum_k w_k * caches[k], added up in the order of k; w_k = weights[places[k]], or 1.

    Arithmetic is fp32 for half types (fp64 for fp64), with one downcast at the end. Per k there is one multiplication
    and, except for the first, one addition, each rounded. Shapes, dtypes and errors are those of
    `harmonica_kernels.forecast`.
    """
    check_forecast(caches, weights, places)
    first = caches[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    return torch.empty_like(first).copy_(summed([*weighted(caches, weights, places, wide)]))


def check_forecast(caches: Sequence[torch.Tensor], weights: torch.Tensor, places: Sequence[int]) -> None:
    """Check the arguments of the op.

    Raises:
        TypeError: a dtype is not fp32, bf16, fp16 or fp64, the dtypes differ, or the weights are not fp32.
        ValueError: there are no caches, the number of places differs from that of caches, there is no weight at a
            place, the shapes differ, or the tensors are on different devices.
    """
    if not caches:
        raise ValueError(f"{_OP}: caches is empty, expected at least one tensor")
    first = caches[0]
    check_dtype(_OP, first, name="caches[0]")
    for k, cache in enumerate(caches[1:], 1):
        check_same(_OP, first, f"caches[{k}]", cache, of="caches[0]")
    check_weights(_OP, first, weights, places, len(caches), of="caches[0]")
