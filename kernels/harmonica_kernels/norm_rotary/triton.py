"""`norm_rotary` for CUDA: one launch for all parts; a program norms and rotates several rows in registers.

A row is held as the first and the second numbers of its pairs. Neighbours are loaded together, 16 bytes per thread, and
taken apart in registers.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from harmonica_kernels._triton import DTYPES, MAX_WIDTH, WARPS, in_memory
from harmonica_kernels.norm_rotary.operands import Operands, Settings, new_results
from harmonica_kernels.norm_rotary.reference import norm_rotary_reference

ELEMENTS: Final = 1024  # numbers per program, where rows are narrower. Not measured yet
MAX_PARTS: Final = 8  # per launch; joint attention has four. More compile a longer kernel


class Place(NamedTuple):
    """A tensor as [outer, middle, inner, width]: its memory, and its strides in elements, 0 where it broadcasts.

    `inner` is None where the rows of a program share one row. `pair` is None where the numbers of a row lie densely;
    else there is one number per pair, and `pair` is their distance.
    """

    memory: torch.Tensor
    outer: int
    middle: int
    inner: int | None
    pair: int | None


class Extent(NamedTuple):
    """The sizes of a part besides its width, and the number of its programs."""

    middle: int
    inner: int
    programs: int


@triton.jit
def _load(place, outer, middle, inner, pairs, mask, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the second numbers of the pairs of some rows in fp32: [rows, pairs], or [1, pairs] if shared."""
    start = place.memory + outer * place.outer + middle * place.middle
    half: tl.constexpr = pairs.shape[1]
    if place.inner is not None:
        start += inner * place.inner
        inside = mask & (pairs < WIDTH // 2)
    else:
        inside = pairs < WIDTH // 2
    if place.pair is not None:
        first = tl.load(start + pairs * place.pair, mask=inside, other=0.0).to(tl.float32)
        return first, first
    if INTERLEAVED:
        columns = tl.arange(0, 2 * half).to(tl.int64)[None, :]
        within = columns < WIDTH
        if place.inner is not None:
            within = mask & within
        row = tl.load(start + columns, mask=within, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(row, (row.shape[0], half, 2)))
    first = tl.load(start + pairs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + pairs + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _mean(first, second, count, ACROSS: tl.constexpr):
    """The mean of the rows, [rows, 1], or of all of them, as one number."""
    sums = tl.sum(first, 1) + tl.sum(second, 1)
    if ACROSS:
        return tl.sum(sums, 0) / count
    return sums[:, None] / count


@triton.jit
def _tile(
    out,
    x,
    weight,
    bias,
    cos,
    sin,
    extent,
    program,
    eps,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    tiles = tl.cdiv(extent.inner, ROWS)
    token = program // tiles
    outer, middle = (token // extent.middle).to(tl.int64), (token % extent.middle).to(tl.int64)
    inner = ((program % tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = inner < extent.inner
    pairs = tl.arange(0, HALF).to(tl.int64)[None, :]
    inside = mask & (pairs < WIDTH // 2)
    first, second = _load(x, outer, middle, inner, pairs, mask, INTERLEAVED, WIDTH)

    if NORM != "none":
        count = WIDTH
        if ACROSS:
            count = WIDTH * extent.inner
        if NORM == "layer":  # before the squares are summed: mean(x^2) - mean^2 would suffer from cancellation
            mean = _mean(first, second, count, ACROSS)
            first, second = tl.where(inside, first - mean, 0.0), tl.where(inside, second - mean, 0.0)
        inverse = tl.rsqrt(_mean(first * first, second * second, count, ACROSS) + eps)
        first, second = first * inverse, second * inverse
    if weight is not None:
        weight_first, weight_second = _load(weight, outer, middle, inner, pairs, mask, INTERLEAVED, WIDTH)
        first, second = first * weight_first, second * weight_second
    if bias is not None:
        bias_first, bias_second = _load(bias, outer, middle, inner, pairs, mask, INTERLEAVED, WIDTH)
        first, second = first + bias_first, second + bias_second
    if cos is not None:
        cos_first, cos_second = _load(cos, outer, middle, inner, pairs, mask, INTERLEAVED, WIDTH)
        sin_first, sin_second = _load(sin, outer, middle, inner, pairs, mask, INTERLEAVED, WIDTH)
        first, second = first * cos_first - second * sin_first, second * cos_second + first * sin_second

    start = out.memory + outer * out.outer + middle * out.middle + inner * out.inner
    dtype = out.memory.dtype.element_ty
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF).to(tl.int64)[None, :]
        row = tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))
        tl.store(start + columns, row.to(dtype), mask=mask & (columns < WIDTH))
    else:
        tl.store(start + pairs, first.to(dtype), mask=inside)
        tl.store(start + pairs + WIDTH // 2, second.to(dtype), mask=inside)


@triton.jit
def _kernel(
    outs,
    xs,
    weights,
    biases,
    coss,
    sins,
    extents,
    eps,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    program = tl.program_id(0)
    for part in tl.static_range(len(xs)):
        if (program >= 0) & (program < extents[part].programs):
            _tile(
                outs[part],
                xs[part],
                weights[part],
                biases[part],
                coss[part],
                sins[part],
                extents[part],
                program,
                eps,
                NORM,
                ACROSS,
                INTERLEAVED,
                WIDTH,
                ROWS,
                HALF,
            )
        program -= extents[part].programs


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
        places[name] = [_place(tensors[index], operands.parts[index], shared=name != "parts") for index in indices]
    outs = tuple(_place(shares[index], operands.parts[index]) for index in indices)
    extents = [_extent(operands.parts[index], rows) for index in indices]
    with torch.cuda.device_of(operands.parts[0]):
        _kernel[(sum(extent.programs for extent in extents),)](
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


def _place(tensor: torch.Tensor | None, part: torch.Tensor, *, shared: bool = False) -> Place | None:
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
    return Place(
        tensor, outer, middle, None if shared and inner == 0 else inner, tensor.stride(-1) if per_pair else None
    )


def _padded(values: list[int], filler: int) -> list[int]:
    return [filler] * (3 - len(values)) + values
