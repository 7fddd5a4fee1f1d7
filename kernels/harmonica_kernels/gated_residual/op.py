"""`harmonica::gated_residual` as a torch operator: schema, fake and implementations per device."""

from __future__ import annotations

import torch

from harmonica_kernels._build import build_info
from harmonica_kernels._cuda import implement_with_triton
from harmonica_kernels._library import LIBRARY, TAGS, warn_once_without_extension
from harmonica_kernels.gated_residual.reference import check_gated_residual, gated_residual_reference

LIBRARY.define("gated_residual(Tensor x, Tensor y, Tensor? gate=None) -> Tensor", tags=TAGS)
# The C++ implementation calls this for arguments that it does not support, so that both paths raise the same errors.
LIBRARY.define("_gated_residual_reference(Tensor x, Tensor y, Tensor? gate=None) -> Tensor", tags=TAGS)


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


def _cpu_without_extension(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    warn_once_without_extension()
    return gated_residual_reference(x, y, gate)


for _name in ("gated_residual", "_gated_residual_reference"):
    # For every device without its own implementation.
    LIBRARY.impl(_name, gated_residual_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"harmonica::{_name}", _fake, lib=LIBRARY)
if not build_info().extension:
    LIBRARY.impl("gated_residual", _cpu_without_extension, "CPU")
implement_with_triton("gated_residual")
