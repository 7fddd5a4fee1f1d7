"""`residual_reuse` for CUDA: one pass over memory per `MAX_TERMS` caches."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

from harmonica_kernels._checks import check_residual_sum
from harmonica_kernels._triton import as_rows, launch_tiles, load, takes
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference

# Caches per launch, by element size in bytes; with more, wide rows need a stack. Not yet measured
MAX_TERMS: Final = {2: 16, 4: 8}


@triton.jit
def load_sum(x, caches, gates, batch, row, columns, mask):
    """x + sum_k gates[k] * caches[k] in fp32, in the order of k, for what `load` takes."""
    total = load(x, batch, row, columns, mask)
    for k in tl.static_range(len(caches)):
        term = load(caches[k], batch, row, columns, mask)
        if gates[k] is not None:
            term = load(gates[k], batch, row, columns, mask) * term
        total += term
    return total


@triton.jit(do_not_specialize=["rows", "count"])
def _kernel(out, x, caches, gates, rows, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    index = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    columns = ((program % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (index < count) & (columns < WIDTH)
    batch, row = (index // rows).to(tl.int64), (index % rows).to(tl.int64)
    total = load_sum(x, caches, gates, batch, row, columns, mask)
    tl.store(out + index.to(tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=mask)


def residual_reuse_triton(
    x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """out = x + sum_k gates[k] * caches[k], equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.residual_reuse`.
    """
    check_residual_sum("residual_reuse", x, caches, gates)
    if not takes(x):
        return residual_reuse_reference(x, caches, gates)
    return add_up(*shorten(x, caches, gates), x.dtype)


def add_up(
    x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> torch.Tensor:
    """The sum of at most `MAX_TERMS` caches in one launch, rounded once to `dtype`."""
    out = x.new_empty(x.shape, dtype=dtype)
    terms = len(caches)
    rows, (x_rows, *others) = as_rows(x.shape, [x, *caches, *gates])
    launch_tiles(_kernel, x, out, x_rows, tuple(others[:terms]), tuple(others[terms:]), rows)
    return out


def shorten(
    x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor | None]]:
    """The same sum, bit for bit, with at most `MAX_TERMS` caches left; earlier ones are added to x in fp32."""
    most = MAX_TERMS[x.element_size()]
    while len(caches) > most:
        x = add_up(x, caches[:most], gates[:most], torch.float32)
        caches, gates = caches[most:], gates[most:]
    return x, caches, gates
