"""The weighted sum of a site's latest values: what a reused entry with weights stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_rt.graph.layout import distinct, laid_out


def weighted_sum(values: Sequence[torch.Tensor], weights: torch.Tensor, row: int) -> torch.Tensor:
    """`sum_j weights[row, j] * values[j]`, in fp32 (fp64 for fp64), rounded once.

    Extrapolation cancels, so neither weights nor sums are rounded to a half type on the way.

    Args:
        values: tensors of one shape, dtype and strides, newest first; some may be one tensor.
        weights: float32 `[rows, order]`, order at least the number of values; on their device.
        row: which weights are theirs.

    Returns:
        A new tensor with the dtype and the strides of the values.
    """
    first = distinct(values[0])
    wide = torch.promote_types(first.dtype, torch.float32)
    total = first.to(wide) * weights[row, 0]
    for age, value in enumerate(values[1:], 1):
        total = total + distinct(value).to(wide) * weights[row, age]
    return laid_out(total.to(first.dtype).expand(values[0].shape), values[0].stride())
