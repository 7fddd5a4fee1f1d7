"""The definition of `gated_residual`, with which every other implementation is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_broadcasts, check_dtype, check_same, check_weights
from harmonica_kernels.residual_reuse.reference import residual_sum


def gated_residual_reference(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + gate * (w * y), in fp32 arithmetic for half types (fp64 for fp64), with one downcast at the end.

    Shapes, dtypes and errors are those of `harmonica_kernels.gated_residual`.
    """
    check_gated_residual(x, y, gate, weights, places)
    return residual_sum(x, [y], [gate], weights, places).to(x.dtype)


def check_gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, weights: torch.Tensor | None, places: Sequence[int]
) -> None:
    """Check the arguments of the op.

    Raises:
        TypeError: a dtype is not fp32, bf16, fp16 or fp64, or the dtypes differ.
        ValueError: the shapes do not fit, there is no weight at the place, or the tensors are on different devices.
    """
    check_dtype("gated_residual", x)
    check_same("gated_residual", x, "y", y)
    check_broadcasts("gated_residual", x, "gate", gate)
    check_weights("gated_residual", x, weights, places, 1)
