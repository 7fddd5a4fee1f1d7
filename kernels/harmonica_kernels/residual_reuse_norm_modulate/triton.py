"""`residual_reuse_norm_modulate` for CUDA: a row's sum stays in registers until its norm is done."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl

from harmonica_kernels._launch import Launch, Launches, Memory, OptionalTensor, Prepared
from harmonica_kernels._triton import as_rows, load, rows_at, run_rows, takes, warps_of, width_of
from harmonica_kernels.residual_reuse.terms import Terms
from harmonica_kernels.residual_reuse.triton import flat, load_sum, most_terms, shorten
from harmonica_kernels.residual_reuse_norm_modulate.operands import Operands
from harmonica_kernels.residual_reuse_norm_modulate.reference import residual_reuse_norm_modulate_reference


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    hidden_out,
    out,
    x,
    caches,
    gates,
    weights,
    codes,
    weight,
    bias,
    scale,
    shift,
    rows,
    eps,
    JOINED: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    batch, row = (index // rows).to(tl.int64), (index % rows).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mask = columns < WIDTH
    hidden = load_sum(x, caches, gates, weights, codes, batch, row, columns, mask, JOINED)
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
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[OptionalTensor],
    weight: OptionalTensor = None,
    bias: OptionalTensor = None,
    scale: OptionalTensor = None,
    shift: OptionalTensor = None,
    *,
    weights: OptionalTensor = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
    rms: bool = False,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = x + sum_k gates[k] * caches[k]; out = (norm(hidden) * weight + bias) * (1 + scale) + shift.

    hidden equals the reference bit for bit. The statistics are those of the unrounded sum, for any number of caches.
    Shapes, dtypes and errors are those of `harmonica_kernels.residual_reuse_norm_modulate`.
    """
    tensors = [x, *caches, *gates, weight, bias, scale, shift, flat(weights)]
    settings = len(caches), len(gates), tuple(places), tuple(counts), bool(rms), float(eps)
    results = run_rows(_LAUNCHES, tensors, *settings)
    if results is None:
        given = (x, caches, gates, weight, bias, scale, shift, weights, places, counts)
        return residual_reuse_norm_modulate_reference(*given, rms=rms, eps=eps)
    hidden, out = results
    return hidden, out


def _prepare(
    tensors: Sequence[Any],
    caches: int,
    gates: int,
    places: tuple[int, ...],
    counts: tuple[int, ...],
    rms: bool,
    eps: float,
) -> Prepared | None:
    first_other, results = 1 + caches + gates, len(tensors)
    x, weights = tensors[0], results - 1
    others = range(first_other, weights)
    given = (x, tensors[1 : caches + 1], tensors[caches + 1 : first_other], *tensors[first_other:], places, counts)
    Operands(*given).check()
    terms = Terms.after_x(caches, counts or (1,) * gates, places, weights)
    if not takes(x, whole=True) or terms.longest > most_terms(x):
        return None
    memory = [*tensors, *(torch.empty(x.shape, dtype=x.dtype, device="meta") for _ in range(2))]
    launches, left = shorten(memory, terms)
    indices, count, width = (*left.operands, *others), left.length, width_of(x)
    rows, strides = as_rows(x.shape, [None if index is None else memory[index] for index in indices])
    operands = [(index or 0, each) for index, each in zip(indices, strides, strict=True)]
    block, codes = triton.next_power_of_2(width), left.codes
    numbers = (rows, eps, left.joined, rms, width, block)

    def arguments(memory: Memory) -> tuple[Any, ...]:
        first, *found = rows_at(memory, operands)
        summed, gated, modulation = tuple(found[:count]), tuple(found[count : 2 * count]), found[2 * count :]
        factors = (memory[weights] if codes else None), codes
        return memory[results], memory[results + 1], first, summed, gated, *factors, *modulation, *numbers

    last = Launch(_kernel, x.numel() // width, warps_of(block), arguments)
    return Prepared.of(memory[results:], 2, [*launches, last])


_LAUNCHES: Final = Launches(_prepare)
