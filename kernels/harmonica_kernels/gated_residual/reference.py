"""The definition of `gated_residual`, with which every other implementation is compared."""

from __future__ import annotations

import torch

from harmonica_kernels._checks import check_broadcasts, check_dtype, check_same


def gated_residual_reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """out = x + gate * y, in fp32 arithmetic for half types (fp64 for fp64), with one downcast at the end.

    Shapes, dtypes and errors are those of `harmonica_kernels.gated_residual`.
    """
    check_gated_residual(x, y, gate)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gated = y.to(wide) if gate is None else gate.to(wide) * y.to(wide)
    return (x.to(wide) + gated).to(x.dtype).contiguous()


def check_gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Check the arguments of the op.

    Raises:
        TypeError: a dtype is not fp32, bf16, fp16 or fp64, or the dtypes differ.
        ValueError: the shapes do not fit, or the tensors are on different devices.
    """
    check_dtype("gated_residual", x)
    check_same("gated_residual", x, "y", y)
    check_broadcasts("gated_residual", x, "gate", gate)
