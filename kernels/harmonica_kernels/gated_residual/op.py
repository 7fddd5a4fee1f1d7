"""`harmonica::gated_residual` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

import torch

from harmonica_kernels._library import register
from harmonica_kernels.gated_residual.reference import check_gated_residual, gated_residual_reference


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """out = x + gate * y, or x + y without a gate.

    This is the residual connection of a DiT sub-layer (adaLN-Zero, arXiv 2212.09748): y is the sub-layer's output, and
    the gate comes from the timestep and class embedding.

    Arithmetic is fp32 for bf16 and fp16 (fp64 for fp64), rounded once to the dtype of x at the end. On the CPU the
    result equals the reference bit for bit. Inference only: there is no gradient formula, and autograd warns if it has
    to differentiate through the op.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, any strides.
        y: like x in shape, dtype and device.
        gate: dtype and device of x, any shape that broadcasts to that of x: [B, 1, D], [D], [B, N, D], ...

    Returns:
        A new contiguous tensor like x; it never aliases an argument.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: the shapes do not fit, or the tensors are on different devices.
    """
    out: torch.Tensor = torch.ops.harmonica.gated_residual.default(x, y, gate)
    return out


def _fake(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    check_gated_residual(x, y, gate)
    return x.new_empty(x.shape)


register(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor? gate=None) -> Tensor",
    reference=gated_residual_reference,
    fake=_fake,
)
