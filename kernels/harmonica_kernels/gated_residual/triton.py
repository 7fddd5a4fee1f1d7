"""`gated_residual` for CUDA: the kernel of `residual_reuse` with one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harmonica_kernels._launch import OptionalTensor
from harmonica_kernels.gated_residual.reference import check_gated_residual, gated_residual_reference
from harmonica_kernels.residual_reuse.triton import launched_sum


def gated_residual_triton(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: OptionalTensor = None,
    weights: OptionalTensor = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + gate * (w * y), equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.gated_residual`; the reference runs for fp64.
    """
    out = launched_sum(_check, x, (y,), (gate,), weights, places)
    return gated_residual_reference(x, y, gate, weights, places) if out is None else out


def _check(x: Any, caches: Sequence[Any], gates: Sequence[Any], weights: Any, places: Any, _: Any) -> None:
    check_gated_residual(x, caches[0], gates[0], weights, places)
