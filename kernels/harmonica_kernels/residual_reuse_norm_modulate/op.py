"""`harmonica::residual_reuse_norm_modulate` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._build import build_info
from harmonica_kernels._cuda import implement_with_triton
from harmonica_kernels._library import LIBRARY, TAGS, warn_once_without_extension
from harmonica_kernels.residual_reuse_norm_modulate.reference import (
    check_residual_reuse_norm_modulate,
    residual_reuse_norm_modulate_reference,
)

_SCHEMA = (
    "(Tensor x, Tensor[] caches, Tensor?[] gates, Tensor? weight=None, Tensor? bias=None, Tensor? scale=None, "
    "Tensor? shift=None, *, bool rms=False, float eps=1e-5) -> (Tensor, Tensor)"
)
LIBRARY.define(f"residual_reuse_norm_modulate{_SCHEMA}", tags=TAGS)
# The C++ implementation calls this for whatever it does not take, so that both paths raise the same errors.
LIBRARY.define(f"_residual_reuse_norm_modulate_reference{_SCHEMA}", tags=TAGS)


def residual_reuse_norm_modulate(
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

    A run of reused residual connections, and the adaLN-Zero norm (arXiv 2212.09748) that the next computed
    sub-layer begins with, in one pass over memory. norm is LayerNorm over D, (h - mean) / sqrt(var + eps) with the
    biased variance, or where `rms` RMSNorm, h / sqrt(mean(h^2) + eps).

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64); the statistics are those of the unrounded hidden, and each
    result is rounded once to the dtype of x. Inference only: there is no gradient formula, and autograd warns when
    it has to go through the op.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, any strides.
        caches: at least one; each like x in shape, dtype and device.
        gates: one for each cache: dtype and device of x, any shape that broadcasts to that of x ([B, 1, D], [D],
            [B, N, D], ...), or None for a factor of 1.
        weight: [D], dtype and device of x, or None for 1.
        bias: [D], dtype and device of x, or None for 0.
        scale: of a shape that broadcasts to that of x, dtype and device of x, or None for 0.
        shift: of a shape that broadcasts to that of x, dtype and device of x, or None for 0.
        rms: RMSNorm in place of LayerNorm.
        eps: what is added to the variance or mean square.

    Returns:
        hidden and out: new contiguous tensors like x; they alias neither each other nor an argument.

    Raises:
        TypeError: a dtype that is not taken, or dtypes that differ.
        ValueError: no caches, another number of gates, shapes that do not fit, or tensors on different devices.
    """
    hidden: torch.Tensor
    out: torch.Tensor
    hidden, out = torch.ops.harmonica.residual_reuse_norm_modulate.default(
        x, caches, gates, weight, bias, scale, shift, rms=rms, eps=eps
    )
    return hidden, out


def _fake(
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
    check_residual_reuse_norm_modulate(x, caches, gates, weight, bias, scale, shift)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _cpu_without_extension(
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
    warn_once_without_extension()
    return residual_reuse_norm_modulate_reference(x, caches, gates, weight, bias, scale, shift, rms=rms, eps=eps)


for _name in ("residual_reuse_norm_modulate", "_residual_reuse_norm_modulate_reference"):
    # Every device without an implementation of its own.
    LIBRARY.impl(_name, residual_reuse_norm_modulate_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"harmonica::{_name}", _fake, lib=LIBRARY)
if not build_info().extension:
    LIBRARY.impl("residual_reuse_norm_modulate", _cpu_without_extension, "CPU")
implement_with_triton("residual_reuse_norm_modulate")
