"""`harmonica::residual_reuse` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_residual_sum
from harmonica_kernels._library import register
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference


def residual_reuse(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + sum_k gates[k] * caches[k], added up in the order of k, in one pass over memory.

    This is a sequence of residual connections (adaLN-Zero, arXiv 2212.09748) whose sub-layers are all reused: only
    these additions remain of them. The gates come from the timestep and class embedding.

    With counts and weights, a sub-layer may also be reused as a weighted sum of several earlier values, which is never
    in memory. Then gates[k] multiplies y_k = sum_j w_j * c_j, where c_j are the next counts[k] of the caches, and w_j
    is the element of the flattened `weights` at the place of c_j. The kernels read weights from memory, so one compiled
    kernel serves any weights. They stay fp32 in every dtype, because extrapolation cancels.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64), rounded once to the dtype of x at the end. On the CPU the
    result equals the reference bit for bit. Inference only: there is no gradient formula, and autograd warns if it has
    to differentiate through the op.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, any strides.
        caches: at least one; each like x in shape, dtype and device.
        gates: one per cache, or per count: dtype and device of x, any shape that broadcasts to that of x ([B, 1, D],
            [D], [B, N, D], ...), or None for a factor of 1.
        weights: fp32, any shape, device of x; None for factors of 1.
        places: one per cache if there are weights, else none: the index of its weight in the flattened `weights`, or -1
            for a factor of 1.
        counts: number of caches per gate; by default 1 each.

    Returns:
        A new contiguous tensor like x; it never aliases an argument.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: there are no caches, the numbers of gates, places or counts do not fit that of caches, there is no
            weight at a place, the shapes do not fit, or the tensors are on different devices.
    """
    out: torch.Tensor = torch.ops.harmonica.residual_reuse.default(x, caches, gates, weights, places, counts)
    return out


def _fake(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[torch.Tensor | None],
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> torch.Tensor:
    check_residual_sum("residual_reuse", x, caches, gates, weights, places, counts)
    return x.new_empty(x.shape)


register(
    "residual_reuse",
    "(Tensor x, Tensor[] caches, Tensor?[] gates, Tensor? weights=None, int[] places=[], int[] counts=[]) -> Tensor",
    reference=residual_reuse_reference,
    fake=_fake,
)
