"""`harmonica::residual_reuse_norm_modulate` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harmonica_kernels._library import register
from harmonica_kernels.residual_reuse_norm_modulate.operands import Operands
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference


def residual_reuse_norm_modulate(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
    rms: bool = False,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = x + sum_k gates[k] * caches[k]; out = (norm(hidden) * weight + bias) * (1 + scale) + shift.

    This is a sequence of reused residual connections, and the adaLN-Zero norm (arXiv 2212.09748) that begins the next
    computed sub-layer, in one pass over memory. norm is LayerNorm over D, (h - mean) / sqrt(var + eps) with the biased
    variance, or RMSNorm, h / sqrt(mean(h^2) + eps), if `rms` is set. With counts and weights, gates[k]
    multiplies a weighted sum of caches, as in `residual_reuse`.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64); the statistics are those of the unrounded hidden, and each
    result is rounded once to the dtype of x. Inference only: there is no gradient formula, and autograd warns if it has
    to differentiate through the op.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, any strides.
        caches: at least one; each like x in shape, dtype and device.
        gates: one per cache, or per count: dtype and device of x, any shape that broadcasts to that of x ([B, 1, D],
            [D], [B, N, D], ...), or None for a factor of 1.
        weight: [D], dtype and device of x, or None for 1.
        bias: [D], dtype and device of x, or None for 0.
        scale: any shape that broadcasts to that of x, dtype and device of x, or None for 0.
        shift: any shape that broadcasts to that of x, dtype and device of x, or None for 0.
        weights: the factors of the caches, not to be confused with `weight`, the norm's parameter: fp32, any shape,
            device of x; None for factors of 1.
        places: one per cache if there are weights, else none: the index of its weight in the flattened `weights`, or -1
            for a factor of 1.
        counts: number of caches per gate; by default 1 each.
        rms: use RMSNorm instead of LayerNorm.
        eps: added to the variance or mean square.

    Returns:
        hidden and out: new contiguous tensors like x; they alias neither each other nor an argument.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: there are no caches, the numbers of gates, places or counts do not fit that of caches, there is no
            weight at a place, the shapes do not fit, or the tensors are on different devices.
    """
    hidden: torch.Tensor
    out: torch.Tensor
    weighting = {"weights": weights, "places": places, "counts": counts}
    hidden, out = torch.ops.harmonica.residual_reuse_norm_modulate.default(
        x, caches, gates, weight, bias, scale, shift, rms=rms, eps=eps, **weighting
    )
    return hidden, out


def _fake(*given: Any, rms: bool = False, eps: float = 1e-5, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = Operands.checked(*given, **named).x
    return x.new_empty(x.shape), x.new_empty(x.shape)


register(
    "residual_reuse_norm_modulate",
    "(Tensor x, Tensor[] caches, Tensor?[] gates, Tensor? weight=None, Tensor? bias=None, Tensor? scale=None, "
    "Tensor? shift=None, *, Tensor? weights=None, int[] places=[], int[] counts=[], bool rms=False, "
    "float eps=1e-5) -> (Tensor, Tensor)",
    reference=residual_reuse_norm_modulate_reference,
    fake=_fake,
)
