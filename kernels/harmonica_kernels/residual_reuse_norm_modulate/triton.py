"""`residual_reuse_norm_modulate` for CUDA: a row's sum stays in registers until its norm is done."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from harmonica_kernels._triton import as_rows, launch_rows, load, takes
from harmonica_kernels.residual_reuse.triton import load_sum, shorten
from harmonica_kernels.residual_reuse_norm_modulate.operands import Operands
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    hidden_out,
    out,
    x,
    caches,
    gates,
    weight,
    bias,
    scale,
    shift,
    rows,
    eps,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    batch, row = (index // rows).to(tl.int64), (index % rows).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mask = columns < WIDTH
    hidden = load_sum(x, caches, gates, batch, row, columns, mask)
    at = index.to(tl.int64) * WIDTH + columns
    tl.store(hidden_out + at, hidden.to(hidden_out.dtype.element_ty), mask=mask)

    # the mean is subtracted before the squares are summed: mean(h^2) - mean^2 would suffer from cancellation
    result = hidden
    if not RMS:
        result = tl.where(mask, hidden - tl.sum(hidden, 0) / WIDTH, 0.0)
    result *= tl.rsqrt(tl.sum(result * result, 0) / WIDTH + eps)
    if weight is not None:
        result *= load(weight, batch, row, columns, mask)
    if bias is not None:
        result += load(bias, batch, row, columns, mask)
    if scale is not None:
        result *= 1 + load(scale, batch, row, columns, mask)
    if shift is not None:
        result += load(shift, batch, row, columns, mask)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def residual_reuse_norm_modulate_triton(
    *given: Any, rms: bool = False, eps: float = 1e-5, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = x + sum_k gates[k] * caches[k]; out = (norm(hidden) * weight + bias) * (1 + scale) + shift.

    hidden equals the reference bit for bit. The statistics are those of the unrounded sum, for any number of caches.
    It takes the `Operands`, in order or by name; shapes, dtypes and errors are those of
    `harmonica_kernels.residual_reuse_norm_modulate`.
    """
    operands = Operands.checked(*given, **named)
    x, caches, gates, *others = operands
    if not takes(x, whole=True):
        return residual_reuse_norm_modulate_reference(*operands, rms=rms, eps=eps)
    hidden, out = x.new_empty(x.shape), x.new_empty(x.shape)
    x, caches, gates = shorten(x, caches, gates)
    terms = len(caches)
    rows, (x_rows, *tables) = as_rows(x.shape, [x, *caches, *gates, *others])
    summed, gated, modulation = tuple(tables[:terms]), tuple(tables[terms : 2 * terms]), tables[2 * terms :]
    launch_rows(_kernel, x, hidden, out, x_rows, summed, gated, *modulation, rows, eps, RMS=rms)
    return hidden, out
