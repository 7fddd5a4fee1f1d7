"""Layouts of tensors, and copies with given strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def laid_out(value: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The value with these strides: itself if it has them, else a copy."""
    if value.stride() == tuple(strides):
        return value
    shape = value.shape
    for dim, stride in enumerate(strides):
        if stride == 0:
            value = value.narrow(dim, 0, 1)
    return value.new_empty_strided(value.shape, tuple(strides)).copy_(value).expand(shape)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and strides."""
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
