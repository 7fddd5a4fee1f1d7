"""`harmonica::forecast` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._library import register
from harmonica_kernels.forecast.reference import check_forecast, forecast_reference


def forecast(caches: Sequence[torch.Tensor], weights: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """out = sum_k w_k * caches[k], added up in the order of k, in one pass over memory; w_k = weights[places[k]], or 1.

    This is a value that is not computed but forecast from earlier ones by any linear rule: extrapolation (TaylorSeer,
    arXiv 2503.06923), ratios, fitted weights. Where a residual connection adds it, `residual_reuse` with weights does
    both at once.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64), rounded once to the dtype of the caches at the end. The
    weights are read from memory, and stay fp32 in every dtype, because extrapolation cancels. On the CPU the result
    equals the reference bit for bit. Inference only: there is no gradient formula, and autograd warns if it has to
    differentiate through the op.

    Args:
        caches: at least one (with more than four, PyTorch runs on the CPU); fp32, bf16, fp16 or fp64, any shape and
            strides, the same shape, dtype and device.
        weights: fp32, any shape, device of the caches.
        places: one per cache: the index of its weight in the flattened `weights`, or -1 for a factor of 1.

    Returns:
        A new tensor like caches[0], laid out as `torch.empty_like` does: with its strides if it is dense. It never
        aliases an argument.

    Raises:
        TypeError: a dtype is not supported, the dtypes differ, or the weights are not fp32.
        ValueError: there are no caches, the number of places differs from that of caches, there is no weight at a
            place, the shapes differ, or the tensors are on different devices.
    """
    out: torch.Tensor = torch.ops.harmonica.forecast.default(caches, weights, places)
    return out


def _fake(caches: Sequence[torch.Tensor], weights: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    check_forecast(caches, weights, places)
    return torch.empty_like(caches[0])


register(
    "forecast",
    "(Tensor[] caches, Tensor weights, int[] places) -> Tensor",
    reference=forecast_reference,
    fake=_fake,
)
