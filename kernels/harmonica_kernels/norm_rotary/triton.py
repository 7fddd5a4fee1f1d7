"""`norm_rotary` for CUDA: one launch for all parts of all results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import triton

from harmonica_kernels._triton import DTYPES, MAX_WIDTH, WARPS, in_memory
from harmonica_kernels.norm_rotary.operands import Operands, Settings, new_results
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference
from harmonica_kernels.norm_rotary.triton_kernel import Extent, Place, kernel

ELEMENTS: Final = 1024  # numbers per program, where rows are narrower. Not measured yet
MAX_PARTS: Final = 8  # per launch; joint attention has four. More compile a longer kernel


def norm_rotary_triton(*given: Any, **named: Any) -> list[torch.Tensor]:
    """Each part normed and rotated, and the parts of each result joined along `dim`.

    It takes the `Operands`, in order or by name, and the `Settings` by name; shapes, dtypes and errors are those of
    `harmonica_kernels.norm_rotary`.
    """
    settings = Settings(**{name: named.pop(name) for name in Settings._fields if name in named})
    operands = Operands.checked(settings, *given, **named)
    tile = _rows_and_pairs(operands, settings.across)
    if tile is None:
        return norm_rotary_reference(*operands, **settings._asdict())
    results = new_results(operands, settings.dim)
    shares = [
        share
        for out, members in zip(results, operands.results(), strict=True)
        for share in out.split([operands.parts[index].shape[settings.dim] for index in members], settings.dim)
    ]
    filled = [index for index, part in enumerate(operands.parts) if part.numel()]
    for begin in range(0, len(filled), MAX_PARTS):
        _launch(operands, shares, filled[begin : begin + MAX_PARTS], settings, tile)
    return results


def _rows_and_pairs(operands: Operands, across: bool) -> tuple[int, int] | None:
    """Rows per program and pairs per row, both powers of two; None for parts that the kernel does not support.

    Not supported are fp64, rows of odd or of different widths, norms over more than a program holds, parts of more than
    four dimensions, and more programs than a grid can hold.
    """
    parts = operands.parts
    width = parts[0].shape[-1]
    most = max(part.shape[-2] for part in parts)
    if parts[0].dtype not in DTYPES or width % 2 or any(part.shape[-1] != width or part.ndim > 4 for part in parts):
        return None
    block: int = triton.next_power_of_2(width) if width else 0
    rows: int = triton.next_power_of_2(most) if most else 1
    if not across:
        rows = max(1, min(rows, ELEMENTS // max(block, 1)))
    programs = sum(part.numel() for part in parts)  # at most
    return (rows, block // 2) if rows * block <= MAX_WIDTH and programs < 2**31 * max(width, 1) else None


def _launch(
    operands: Operands,
    shares: Sequence[torch.Tensor],
    indices: Sequence[int],
    settings: Settings,
    tile: tuple[int, int],
) -> None:
    rows, half = tile
    width = operands.parts[0].shape[-1]
    places: dict[str, list[Place | None]] = {}
    for name in ("parts", "weights", "biases", "cos", "sin"):
        tensors = getattr(operands, name)
        places[name] = [_place(tensors[index], operands.parts[index]) for index in indices]
    outs = tuple(_place(shares[index], operands.parts[index]) for index in indices)
    extents = [_extent(operands.parts[index], rows) for index in indices]
    with torch.cuda.device_of(operands.parts[0]):
        kernel[(sum(extent.programs for extent in extents),)](
            outs,
            *map(tuple, places.values()),
            tuple(extents),
            settings.eps,
            NORM=settings.norm,
            ACROSS=settings.across,
            INTERLEAVED=settings.interleaved,
            WIDTH=width,
            ROWS=rows,
            HALF=half,
            num_warps=WARPS.get(2 * half * rows, 1),
            enable_fp_fusion=False,
        )


def _extent(part: torch.Tensor, rows: int) -> Extent:
    outer, middle, inner = _padded(list(part.shape[:-1]), 1)
    return Extent(middle, inner, outer * middle * math.ceil(inner / rows))


def _place(tensor: torch.Tensor | None, part: torch.Tensor) -> Place | None:
    """Where the rows of a tensor lie that broadcasts to a part, or is a vector for the last dimensions of it."""
    if tensor is None:
        return None
    tensor = in_memory(tensor)
    width = part.shape[-1]
    if tensor.numel() > width and tensor.ndim == 1:  # a norm over the last two dimensions
        tensor = tensor.view(-1, width)
    per_pair = tensor.shape[-1] != width
    if tensor.stride(-1) != 1 and not per_pair:
        tensor = tensor.contiguous()
    leading = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    outer, middle, inner = _padded([0 if size == 1 else stride for size, stride in leading], 0)
    if not per_pair:
        return Place(tensor, outer, middle, inner, None)
    return Place(tensor, outer, middle, inner or None, tensor.stride(-1))


def _padded(values: list[int], filler: int) -> list[int]:
    return [filler] * (3 - len(values)) + values
