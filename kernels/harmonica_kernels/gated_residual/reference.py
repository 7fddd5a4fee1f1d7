"""The definition of `gated_residual`: what every other implementation is compared with."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gated_residual_reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """out = x + gate * y, in fp32 arithmetic for half types (fp64 for fp64), with one downcast at the end.

    Shapes, dtypes and errors are those of `harmonica_kernels.gated_residual`.
    """
    check_gated_residual(x, y, gate)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gated = y.to(wide) if gate is None else gate.to(wide) * y.to(wide)
    return (x.to(wide) + gated).to(x.dtype).contiguous()


def check_gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> None:
    """Refuse arguments that the op does not take.

    Raises:
        TypeError: a dtype that is not fp32, bf16, fp16 or fp64, or dtypes that differ.
        ValueError: shapes that do not fit, or tensors on different devices.
    """
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"gated_residual: x has dtype {x.dtype}, expected one of {allowed}")
    if y.shape != x.shape:
        raise ValueError(f"gated_residual: y has shape {list(y.shape)}, expected that of x, {list(x.shape)}")
    for name, tensor in (("y", y), ("gate", gate)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"gated_residual: {name} has dtype {tensor.dtype}, expected that of x, {x.dtype}; cast it")
        if tensor.device != x.device:
            raise ValueError(f"gated_residual: {name} is on {tensor.device}, x is on {x.device}; move one of them")
    if gate is not None and not _broadcasts_to(gate.shape, x.shape):
        raise ValueError(
            f"gated_residual: gate has shape {list(gate.shape)}, which does not broadcast to that of x, "
            f"{list(x.shape)}; expected e.g. [B, 1, D] or [D]"
        )


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    trailing = zip(reversed(shape), reversed(target), strict=False)
    return all(size == 1 or size == wanted for size, wanted in trailing)
