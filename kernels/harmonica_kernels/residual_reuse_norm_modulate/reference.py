"""The definition of `residual_reuse_norm_modulate`, with which every other implementation is compared."""

from __future__ import annotations

from typing import Any

import torch

from harmonica_kernels.residual_reuse.reference import residual_sum
from harmonica_kernels.residual_reuse_norm_modulate.operands import Operands


def residual_reuse_norm_modulate_reference(
    *given: Any, rms: bool = False, eps: float = 1e-5, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = x + sum_k gates[k] * caches[k]; out = (norm(hidden) * weight + bias) * (1 + scale) + shift.

    Arithmetic is fp32 for half types (fp64 for fp64), statistics are those of the unrounded hidden, and each result
    is downcast once. It takes the `Operands`, in order or by name; shapes, dtypes, errors and what weights do are those
    of `harmonica_kernels.residual_reuse_norm_modulate`.
    """
    x, caches, gates, weight, bias, scale, shift, weights, places, counts = Operands.checked(*given, **named)
    hidden = residual_sum(x, caches, gates, weights, places, counts)
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
