"""`gated_residual` for CUDA: the kernel of `residual_reuse` with one cache."""

from __future__ import annotations

import torch

from harmonica_kernels._triton import takes
from harmonica_kernels.gated_residual.reference import check_gated_residual, gated_residual_reference
from harmonica_kernels.residual_reuse.triton import add_up


def gated_residual_triton(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """out = x + gate * y, equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.gated_residual`; the reference runs for fp64.
    """
    check_gated_residual(x, y, gate)
    return add_up(x, [y], [gate], x.dtype) if takes(x) else gated_residual_reference(x, y, gate)
