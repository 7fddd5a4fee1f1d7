"""Describes how tensors lie in memory (shared elements, extent, same layout), and copies them to given strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expanded_dims(tensor: torch.Tensor) -> list[int]:
    """The dimensions along which all elements share one address."""
    return [dim for dim, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if s == 0 and n > 1]


def distinct(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor without repetitions along the dimensions that are expanded in `like` (default: in itself)."""
    for dim in expanded_dims(tensor if like is None else like):
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The number of elements from the first to the last in memory, gaps included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


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
