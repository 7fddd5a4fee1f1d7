"""`harmonica::gated_residual` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmonica_kernels._library import register
from harmonica_kernels.gated_residual.reference import check_gated_residual, gated_residual_reference


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + gate * (w * y), with factors of 1 where there is no gate or no weight.

    This is the residual connection of a DiT sub-layer (adaLN-Zero, arXiv 2212.09748): y is the sub-layer's output, and
    the gate comes from the timestep and class embedding. The weight w scales an earlier output that is reused. It is
    read from memory, and stays fp32 in every dtype.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64), rounded once to the dtype of x at the end. On the CPU the
    result equals the reference bit for bit. Inference only: there is no gradient formula, and autograd warns if it has
    to differentiate through the op.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, any strides.
        y: like x in shape, dtype and device.
        gate: dtype and device of x, any shape that broadcasts to that of x: [B, 1, D], [D], [B, N, D], ...
        weights: fp32, any shape, device of x; None for a factor of 1.
        places: with weights, a list of one number, the index of w in the flattened `weights`, or -1 for a factor of 1.

    Returns:
        A new contiguous tensor like x; it never aliases an argument.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: the shapes do not fit, there is no weight at the place, or the tensors are on different devices.
    """
    out: torch.Tensor = torch.ops.harmonica.gated_residual.default(x, y, gate, weights, places)
    return out


def _fake(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    check_gated_residual(x, y, gate, weights, places)
    return x.new_empty(x.shape)


register(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor? gate=None, Tensor? weights=None, int[] places=[]) -> Tensor",
    reference=gated_residual_reference,
    fake=_fake,
)
