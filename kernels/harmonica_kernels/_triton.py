"""Holds what the Triton kernels share: tensors as rows, and the launch with its block sizes.

One program works on a whole row, or on a tile of some rows and columns. The start of a row is computed once, so the
same code serves any strides and broadcasts. Triton compiles a kernel anew for each width, dtype, number of caches, and
pattern of missing tensors and of strides that are 1 or multiples of 16, but not for each number of rows.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
TILE: Final = 1024  # elements per program, if a row may be split. Not yet tuned by measurement
LEAST_COLUMNS: Final = 64  # of a tile, if the row has as many: 128 bytes in half types, read at once by a few threads
MAX_WIDTH: Final = 8192  # columns per program, if not; no known DiT is wider. Not yet tuned by measurement
# Warps by elements per program; fewer get 1 warp. 8 columns per thread load 16 bytes in half types. With 16 (two
# loads), wide rows need no stack (except 56 bytes for 16 caches of 8192 in Triton 3.6 on sm_80). Not yet measured
WARPS: Final = {512: 2, 1024: 4, 2048: 8, 4096: 8, 8192: 16}


class Rows(NamedTuple):
    """A tensor as [batches, rows, width]: its memory, and its strides in elements, which are 0 where it broadcasts."""

    memory: torch.Tensor
    batch: int
    row: int
    column: int


def as_rows(shape: torch.Size, tensors: Sequence[torch.Tensor | None]) -> tuple[int, list[Rows | None]]:
    """The number of rows in a batch, and the tensors, each broadcast to `shape`, as rows.

    Dimensions that every tensor steps through evenly are merged. If more than two remain besides the width, as for
    views that no known model makes, all tensors are copied.
    """
    shape = shape or torch.Size([1])
    spread = [None if tensor is None else in_memory(tensor).expand(shape) for tensor in tensors]
    present = [tensor for tensor in spread if tensor is not None]
    merged: list[tuple[int, list[int]]] = []  # the size of each dimension left, and the stride of each tensor in it
    for axis, size in enumerate(shape[:-1]):
        strides = [tensor.stride(axis) for tensor in present]
        if merged and merged[-1][1] == [size * stride for stride in strides]:
            merged[-1] = (merged[-1][0] * size, strides)
        elif size > 1:
            merged.append((size, strides))
    if len(merged) > 2:
        return as_rows(shape, [None if tensor is None else tensor.contiguous() for tensor in spread])
    single = (1, [0] * len(present))  # stands for a dimension that is not there
    (_, batch), (rows, row) = [single] * (2 - len(merged)) + merged
    steps = zip(batch, row, strict=True)
    return rows, [None if tensor is None else Rows(tensor, *next(steps), tensor.stride(-1)) for tensor in spread]


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its values are not those in its memory.

    This is the case for negated views and zero tensors without memory. The dispatcher materialises them before it calls
    an op, but not if they come in a list of optional tensors, as gates do.
    """
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def takes(x: torch.Tensor, whole: bool = False) -> bool:
    """Whether the kernels support rows like those of `x`; otherwise the reference runs.

    They do not support fp64, empty tensors, rows too wide for a program that needs them `whole`, or more programs than
    a grid can hold.
    """
    if x.dtype not in DTYPES or x.numel() == 0 or x.numel() // _width(x) >= 2**31 - TILE:
        return False
    return _width(x) <= MAX_WIDTH if whole else _tiles(x) < 2**31


def launch_rows(kernel: Any, x: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` for each row of `x`."""
    width = _width(x)
    block = triton.next_power_of_2(width)
    _launch(kernel, x, x.numel() // width, block, *arguments, **constants, BLOCK=block)


def launch_tiles(kernel: Any, x: torch.Tensor, *arguments: Any) -> None:
    """Run `kernel` for each tile of `x`; its last argument is the number of rows."""
    width = _width(x)
    rows, columns = tile_of(width)
    _launch(kernel, x, _tiles(x), rows * columns, *arguments, x.numel() // width, ROWS=rows, COLUMNS=columns)


def tile_of(width: int) -> tuple[int, int]:
    """The rows and columns of a tile: the number of columns by which a row has the fewest empty ones, and is widest."""
    columns = min(TILE, triton.next_power_of_2(width))
    sizes = [columns >> shift for shift in range(columns.bit_length()) if columns >> shift >= LEAST_COLUMNS]
    columns = min(sizes, key=lambda size: math.ceil(width / size) * size, default=columns)
    return TILE // columns, columns


def _launch(kernel: Any, x: torch.Tensor, programs: int, elements: int, *arguments: Any, **constants: Any) -> None:
    """Launch `programs` that work on so many elements each.

    Contraction of products and sums into one instruction is off: each is rounded, as in the reference, so a residual
    sum in fp32 has the same bits on every device. (In half types it would anyway: their products are exact in fp32.)
    These kernels are memory-bound, so the additional instruction does not matter.
    """
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            *arguments, **constants, WIDTH=_width(x), num_warps=WARPS.get(elements, 1), enable_fp_fusion=False
        )


def _width(x: torch.Tensor) -> int:
    return math.prod(x.shape[-1:])


def _tiles(x: torch.Tensor) -> int:
    width = _width(x)
    rows, columns = tile_of(width)
    return math.ceil(x.numel() // width / rows) * math.ceil(width / columns)


@triton.jit
def load(rows, batch, row, columns, mask):
    """Columns of rows in fp32, of one or (`[ROWS, 1]`) of several.

    batch, row and columns are int64: their products with strides may exceed 2^31.
    """
    start = rows.memory + batch * rows.batch + row * rows.row
    return tl.load(start + columns * rows.column, mask=mask, other=0.0).to(tl.float32)
