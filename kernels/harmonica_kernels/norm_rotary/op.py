"""`harmonica::norm_rotary` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harmonica_kernels._library import register
from harmonica_kernels.norm_rotary.operands import Operands, Optional, Settings, new_results
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference


def norm_rotary(
    parts: Sequence[torch.Tensor],
    counts: Sequence[int],
    weights: Sequence[Optional],
    biases: Sequence[Optional],
    cos: Sequence[Optional],
    sin: Sequence[Optional],
    *,
    dim: int = 1,
    norm: str = "rms",
    across: bool = False,
    eps: float = 1e-5,
    interleaved: bool = True,
) -> list[torch.Tensor]:
    """out = rotate(norm(x) * weight + bias) for every part x, with the parts of each result joined.

    This is what becomes of queries and keys between their projections and the attention; those of a joint attention are
    joined from those of text and image. norm is RMSNorm (arXiv 1910.07467), x / sqrt(mean(x^2) + eps); LayerNorm,
    (x - mean) / sqrt(var + eps) with the biased variance; or none. rotate is the rotary embedding (arXiv 2104.09864),
    of each pair (a, b) in a row, (a cos_a - b sin_a, b cos_b + a sin_b). Pairs are neighbours if `interleaved`, else b
    is half a row after a. All parts take one pass over memory and, on CUDA, one launch.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64), rounded once to the dtype of the parts. Inference only: there
    is no gradient formula, and autograd warns if it has to differentiate through the op.

    Args:
        parts: tensors [..., D], e.g. [B, N, H, D], fp32, bf16, fp16 or fp64, any strides; all on one device and of one
            dtype.
        counts: for each result, how many of the parts it joins, in order. Those have the same shape except in `dim`.
        weights: one per part: [D], or [H * D] if `across`, in the dtype of the parts or in fp32; None for 1.
        biases: one per part, the same; None for 0.
        cos: one per part: any shape that broadcasts to the part's ([N, 1, D], [1, N, 1, D], ...), or to [..., D / 2]
            where both numbers of a pair have the same, in the dtype of the parts or in fp32 (fp64 with half types too);
            None for a part that is not rotated.
        sin: the same as `cos`.
        dim: dimension along which parts are joined, counted from the first.
        norm: "rms", "layer" or "none".
        across: the norm is over the last two dimensions, [H, D], instead of over D.
        eps: added to the variance or mean square.
        interleaved: whether the numbers of a pair are neighbours.

    Returns:
        One new contiguous tensor per entry of `counts`; they alias neither each other nor an argument.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: the numbers of tensors or the shapes do not fit, or the tensors are on different devices.
    """
    results: list[torch.Tensor] = torch.ops.harmonica.norm_rotary.default(
        parts, counts, weights, biases, cos, sin, dim=dim, norm=norm, across=across, eps=eps, interleaved=interleaved
    )
    return results


def _fake(*given: Any, **named: Any) -> list[torch.Tensor]:
    settings = Settings(**{name: named.pop(name) for name in Settings._fields if name in named})
    return new_results(Operands.checked(settings, *given, **named), settings.dim)


register(
    "norm_rotary",
    "(Tensor[] parts, int[] counts, Tensor?[] weights, Tensor?[] biases, Tensor?[] cos, Tensor?[] sin, *, int dim=1, "
    'str norm="rms", bool across=False, float eps=1e-5, bool interleaved=True) -> Tensor[]',
    reference=norm_rotary_reference,
    fake=_fake,
)
