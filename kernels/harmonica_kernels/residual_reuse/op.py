"""`harmonica::residual_reuse` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._checks import check_residual_sum
from harmonica_kernels._library import register
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference


def residual_reuse(
    x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """out = x + sum_k gates[k] * caches[k], added up in the order of k, in one pass over memory.

    This is a sequence of residual connections (adaLN-Zero, arXiv 2212.09748) whose sub-layers are all reused: only
    these additions remain of them. The gates come from the timestep and class embedding.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64), rounded once to the dtype of x at the end. On the CPU the
    result equals the reference bit for bit. Inference only: there is no gradient formula, and autograd warns if it has
    to differentiate through the op.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, any strides.
        caches: at least one; each like x in shape, dtype and device.
        gates: one per cache: dtype and device of x, any shape that broadcasts to that of x ([B, 1, D], [D],
            [B, N, D], ...), or None for a factor of 1.

    Returns:
        A new contiguous tensor like x; it never aliases an argument.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: there are no caches, the number of gates differs from that of caches, the shapes do not fit, or the
            tensors are on different devices.
    """
    out: torch.Tensor = torch.ops.harmonica.residual_reuse.default(x, caches, gates)
    return out


def _fake(x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None]) -> torch.Tensor:
    check_residual_sum("residual_reuse", x, caches, gates)
    return x.new_empty(x.shape)


register(
    "residual_reuse",
    "(Tensor x, Tensor[] caches, Tensor?[] gates) -> Tensor",
    reference=residual_reuse_reference,
    fake=_fake,
)
