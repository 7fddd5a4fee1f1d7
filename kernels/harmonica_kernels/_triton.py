"""What the Triton kernels share: tensors as rows, and the launch with its block sizes.

One program works on one row, or on a block of its columns: where a row begins is computed once, so the same code
serves any strides and broadcasts. Triton compiles a kernel again for each width, dtype, number of caches, and pattern
of missing tensors and of strides that are 1 or multiples of 16; not for other numbers of rows.
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
MAX_BLOCK: Final = 1024  # columns of a program that may split rows. Not measured yet
MAX_WIDTH: Final = 8192  # columns of a program that may not; no known DiT has more. Not measured yet
# Warps by columns of a program, 1 where there are fewer: 8 columns per thread load 16 bytes in half types. With
# 16, two of them, wide rows need no stack (but 56 bytes for 16 caches of 8192 in Triton 3.6 on sm_80). Not measured yet
WARPS: Final = {512: 2, 1024: 4, 2048: 8, 4096: 8, 8192: 16}


class Rows(NamedTuple):
    """A tensor as [batches, rows, width]: its memory, and its strides in elements, 0 where it broadcasts."""

    memory: torch.Tensor
    batch: int
    row: int
    column: int


def as_rows(shape: torch.Size, tensors: Sequence[torch.Tensor | None]) -> tuple[int, list[Rows | None]]:
    """The number of rows in a batch, and the tensors, each broadcast to `shape`, as rows.

    Sizes that every tensor steps through evenly are merged. Where more than two are left beside the width, as in
    views that no known model makes, all tensors are copied.
    """
    shape = shape or torch.Size([1])
    spread = [None if tensor is None else in_memory(tensor).expand(shape) for tensor in tensors]
    present = [tensor for tensor in spread if tensor is not None]
    merged: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(shape[:-1]):
        strides = [tensor.stride(axis) for tensor in present]
        if merged and merged[-1][1] == [size * stride for stride in strides]:
            merged[-1] = (merged[-1][0] * size, strides)
        elif size > 1:
            merged.append((size, strides))
    if len(merged) > 2:
        return as_rows(shape, [None if tensor is None else tensor.contiguous() for tensor in spread])
    single = (1, [0] * len(present))
    (_, batch), (rows, row) = [single] * (2 - len(merged)) + merged
    steps = zip(batch, row, strict=True)
    return rows, [None if tensor is None else Rows(tensor, *next(steps), tensor.stride(-1)) for tensor in spread]


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its numbers are not those in its memory.

    Those are negated views and zeros without memory. The dispatcher makes them ordinary before it calls an op, but not
    where they come in a list of optional tensors, as gates do.
    """
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def takes(x: torch.Tensor, whole: bool = False) -> bool:
    """Whether the kernels take rows like those of `x`; what they do not take is left to the reference.

    That is fp64, what is empty, rows too wide for a program that needs them `whole`, and more programs than a grid
    has room for.
    """
    width = _width(x)
    return x.dtype in DTYPES and x.numel() > 0 and not (whole and width > MAX_WIDTH) and _programs(x, whole) < 2**31


def launch(kernel: Any, x: torch.Tensor, *arguments: Any, whole: bool = False, **constants: Any) -> None:
    """Run `kernel` for each row of `x`, or for each block of columns of each row unless it needs rows `whole`.

    Contraction of products and sums to one instruction is off: each is rounded, as in the reference, so a residual
    sum in fp32 has the same bits on every device. (In half types it would have them anyway: their products are exact
    in fp32.) These kernels wait for memory, not for the additional instruction.
    """
    block = _block(x, whole)
    with torch.cuda.device_of(x):
        kernel[(_programs(x, whole),)](
            *arguments, **constants, WIDTH=_width(x), BLOCK=block, num_warps=WARPS.get(block, 1), enable_fp_fusion=False
        )


def _width(x: torch.Tensor) -> int:
    return math.prod(x.shape[-1:])


def _block(x: torch.Tensor, whole: bool) -> int:
    block: int = triton.next_power_of_2(_width(x))
    return block if whole else min(block, MAX_BLOCK)


def _programs(x: torch.Tensor, whole: bool) -> int:
    return x.numel() // _width(x) * math.ceil(_width(x) / _block(x, whole))


@triton.jit
def load(rows, batch, row, columns, mask):
    """Columns of one row in fp32. batch, row and columns are int64: their products with strides may pass 2^31."""
    start = rows.memory + batch * rows.batch + row * rows.row
    return tl.load(start + columns * rows.column, mask=mask, other=0.0).to(tl.float32)
