"""`forecast` for CUDA: the kernel of `residual_reuse` with nothing before its terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from harmonica_kernels._launch import Launches, NotRows, Prepared
from harmonica_kernels._triton import takes
from harmonica_kernels.forecast.reference import check_forecast, forecast_reference
from harmonica_kernels.residual_reuse.terms import Entry, Terms
from harmonica_kernels.residual_reuse.triton import flat, launch, most_terms


def forecast_triton(caches: Sequence[torch.Tensor], weights: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """out = sum_k w_k * caches[k], equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.forecast`.
    """
    results = LAUNCHES.run([*caches, flat(weights)], tuple(places))
    return forecast_reference(caches, weights, places) if results is None else results[0]


def _prepare(tensors: Sequence[Any], places: tuple[int, ...]) -> Prepared | None:
    *caches, weights = tensors
    check_forecast(caches, weights, places)
    count, result = len(caches), torch.empty_like(caches[0], device="meta")
    lies = [(size > 1, -stride) for size, stride in zip(result.shape, result.stride(), strict=True)]
    order = sorted(range(result.ndim), key=lies.__getitem__)  # the result is contiguous in this order of dimensions
    *ordered, out = (tensor.permute(order) for tensor in (*caches, result))
    if not takes(out) or count > most_terms(out):
        return None
    terms = Terms(None, (Entry(range(count), None, places),), count)
    try:
        only = launch([*ordered, weights, out], terms, count + 1)
    except NotRows:
        return None
    return Prepared.of([result], 1, [only])


LAUNCHES: Final = Launches(_prepare)
