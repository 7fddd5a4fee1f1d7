"""The definition of `norm_rotary`, with which every other implementation is compared."""

from __future__ import annotations

from typing import Any

import torch

from harmonica_kernels.norm_rotary.operands import Operands, Settings


def norm_rotary_reference(*given: Any, **named: Any) -> list[torch.Tensor]:
    """Each part normed and rotated, and the parts of each result joined along `dim`.

    Arithmetic is fp32 for half types (fp64 for fp64), with one downcast at the end. It takes the `Operands`, in order
    or by name, and the `Settings` by name; shapes, dtypes and errors are those of `harmonica_kernels.norm_rotary`.
    """
    settings = Settings(**{name: named.pop(name) for name in Settings._fields if name in named})
    operands = Operands.checked(settings, *given, **named)
    results = []
    for members in operands.results():
        joined = torch.cat([_part(operands, index, settings) for index in members], dim=settings.dim)
        results.append(joined.to(operands.parts[0].dtype).contiguous())
    return results


def _part(operands: Operands, index: int, settings: Settings) -> torch.Tensor:
    """One part, normed and rotated, in the dtype of the arithmetic."""
    x = operands.parts[index]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide)
    if settings.norm != "none":
        dims = [-2, -1] if settings.across else [-1]
        centred = out - out.mean(dims, keepdim=True) if settings.norm == "layer" else out
        out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + settings.eps)
    for vector, apply in ((operands.weights[index], torch.mul), (operands.biases[index], torch.add)):
        if vector is not None:
            out = apply(out, vector.to(wide).view(out.shape[-2:] if settings.across else out.shape[-1:]))
    cos, sin = operands.cos[index], operands.sin[index]
    return out if cos is None or sin is None else _rotated(out, cos.to(wide), sin.to(wide), settings.interleaved)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    first, second = _pairs(x, interleaved)
    (cos_first, cos_second), (sin_first, sin_second) = (
        _pairs(table, interleaved) if table.shape[-1] == x.shape[-1] else (table, table) for table in (cos, sin)
    )
    turned = (first * cos_first - second * sin_first, second * cos_second + first * sin_second)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """The first and the second numbers of all pairs."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
