"""Holds what the Triton kernels share: tensors as rows, and block sizes.

One program works on a whole row, or on a tile of some rows and columns. The start of a row is computed once, so the
same code serves any strides and broadcasts. Triton compiles a kernel anew for each width, dtype, number of caches, and
pattern of missing tensors and of strides that are 1 or multiples of 16, but not for each number of rows.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from harmonica_kernels._launch import Launches, Memory, NotRows, OptionalTensor

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
TILE: Final = 1024  # elements per program, if a row may be split. Not yet tuned by measurement
LEAST_COLUMNS: Final = 64  # of a tile, if the row has as many: 128 bytes in half types, read at once by a few threads
MAX_WIDTH: Final = 8192  # columns per program, if not; no known DiT is wider. Not yet tuned by measurement
# Warps by elements per program; fewer get 1 warp. 8 columns per thread load 16 bytes in half types. With 16 (two
# loads), wide rows need no stack (except 56 bytes for 16 caches of 8192 in Triton 3.6 on sm_80). Not yet measured
WARPS: Final = {512: 2, 1024: 4, 2048: 8, 4096: 8, 8192: 16}


class Rows(NamedTuple):
    """A tensor as [batches, rows, width]: its memory, and its strides in elements, which are 0 where it broadcasts."""

    memory: Any  # the tensor, or its address
    batch: int
    row: int
    column: int


_rows = functools.partial(tuple.__new__, Rows)  # half the time of Rows(...)
Strides = tuple[int, int, int]  # those of `Rows`


def as_rows(shape: torch.Size, tensors: Sequence[OptionalTensor]) -> tuple[int, list[Strides | None]]:
    """The number of rows in a batch, and the strides of each tensor, broadcast to `shape`, as in `Rows`.

    Dimensions that every tensor steps through evenly are merged.

    Raises:
        NotRows: more than two dimensions remain besides the width, as for views that no known model makes.
    """
    shape = shape or torch.Size([1])
    spread = [None if tensor is None else tensor.expand(shape) for tensor in tensors]
    present = [tensor for tensor in spread if tensor is not None]
    merged: list[tuple[int, list[int]]] = []  # the size of each dimension left, and the stride of each tensor in it
    for axis, size in enumerate(shape[:-1]):
        strides = [tensor.stride(axis) for tensor in present]
        if merged and merged[-1][1] == [size * stride for stride in strides]:
            merged[-1] = (merged[-1][0] * size, strides)
        elif size > 1:
            merged.append((size, strides))
    if len(merged) > 2:
        raise NotRows
    single = (1, [0] * len(present))  # stands for a dimension that is not there
    (_, batch), (rows, row) = [single] * (2 - len(merged)) + merged
    steps = zip(batch, row, strict=True)
    return rows, [None if tensor is None else (*next(steps), tensor.stride(-1)) for tensor in spread]


def rows_at(memory: Memory, places: Sequence[tuple[int, Strides | None]]) -> list[Rows | None]:
    """What lies at these indices of `memory`, as rows with these strides; None where there are none."""
    return [None if strides is None else _rows((memory[index], *strides)) for index, strides in places]


def run_rows(launches: Launches, tensors: list[OptionalTensor], *settings: Hashable) -> list[torch.Tensor] | None:
    """See `Launches.run`; where tensors are views that are no rows, all are copied."""
    try:
        return launches.run(tensors, *settings)
    except NotRows:
        shape = tensors[0].shape  # type: ignore[union-attr]
        dense = [t.expand(shape).contiguous() if t is not None and t.ndim > 1 else t for t in tensors]
        return launches.run(dense, *settings)


def takes(x: torch.Tensor, whole: bool = False) -> bool:
    """Whether the kernels support rows like those of `x`; otherwise the reference runs.

    They do not support fp64, empty tensors, rows too wide for a program that needs them `whole`, or more programs than
    a grid can hold.
    """
    if x.dtype not in DTYPES or x.numel() == 0 or x.numel() // width_of(x) >= 2**31 - TILE:
        return False
    return width_of(x) <= MAX_WIDTH if whole else tiles_of(x) < 2**31


def tile_of(width: int) -> tuple[int, int]:
    """The rows and columns of a tile: the number of columns by which a row has the fewest empty ones, and is widest."""
    columns = min(TILE, triton.next_power_of_2(width))
    sizes = [columns >> shift for shift in range(columns.bit_length()) if columns >> shift >= LEAST_COLUMNS]
    columns = min(sizes, key=lambda size: math.ceil(width / size) * size, default=columns)
    return TILE // columns, columns


def warps_of(elements: int) -> int:
    """The warps of a program that works on so many elements."""
    return WARPS.get(elements, 1)


def width_of(x: torch.Tensor) -> int:
    """The number of columns; 1 for a single number."""
    return math.prod(x.shape[-1:])


def tiles_of(x: torch.Tensor) -> int:
    """The number of tiles, see `tile_of`."""
    width = width_of(x)
    rows, columns = tile_of(width)
    return math.ceil(x.numel() // width / rows) * math.ceil(width / columns)


@triton.jit
def load(rows, batch, row, columns, mask):
    """Columns of rows in fp32, of one or (`[ROWS, 1]`) of several.

    batch, row and columns are int64: their products with strides may exceed 2^31.
    """
    start = rows.memory + batch * rows.batch + row * rows.row
    return tl.load(start + columns * rows.column, mask=mask, other=0.0).to(tl.float32)
