"""The definition of `residual_reuse_norm_modulate`, with which every other implementation is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_broadcasts, check_residual_sum, check_width
from harmonica_kernels.residual_reuse.reference import residual_sum

_OP = "residual_reuse_norm_modulate"


def residual_reuse_norm_modulate_reference(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    rms: bool = False,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = x + sum_k gates[k] * caches[k]; out = (norm(hidden) * weight + bias) * (1 + scale) + shift.

    Arithmetic is fp32 for half types (fp64 for fp64), statistics are those of the unrounded hidden, and each result
    is downcast once. Shapes, dtypes and errors are those of `harmonica_kernels.residual_reuse_norm_modulate`.
    """
    check_residual_reuse_norm_modulate(x, caches, gates, weight, bias, scale, shift)
    hidden = residual_sum(x, caches, gates)
    centred = hidden if rms else hidden - hidden.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(out.dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if scale is not None:
        out = out * (1 + scale.to(out.dtype))
    if shift is not None:
        out = out + shift.to(out.dtype)
    return hidden.to(x.dtype), out.to(x.dtype)


def check_residual_reuse_norm_modulate(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> None:
    """Check the arguments of the op.

    Raises:
        TypeError: a dtype is not fp32, bf16, fp16 or fp64, or the dtypes differ.
        ValueError: there are no caches, the number of gates differs from that of caches, the shapes do not fit, or the
            tensors are on different devices.
    """
    check_residual_sum(_OP, x, caches, gates)
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x is a single number, expected [..., D]")
    check_width(_OP, x, "weight", weight)
    check_width(_OP, x, "bias", bias)
    check_broadcasts(_OP, x, "scale", scale)
    check_broadcasts(_OP, x, "shift", shift)
