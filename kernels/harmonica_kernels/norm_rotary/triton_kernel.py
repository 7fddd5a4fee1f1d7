"""The kernel of `norm_rotary`: a program norms and rotates several rows of one part in registers.

A row is held as the first and the second numbers of its pairs. Neighbours are loaded together, 16 bytes per thread, and
taken apart in registers.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Place(NamedTuple):
    """A tensor as [outer, middle, inner, width]: its memory, and its strides in elements, 0 where it broadcasts.

    Two of them may be missing, and are tuples of no or of one stride. `pair` is empty where the numbers of a row lie
    densely; else there is one number per pair, `pair` has their distance, and `inner` is empty if all rows of a program
    share them. None would not do: Triton 3.4 to 3.6 cannot compare a tuple with None inside, or tell its length.
    """

    memory: torch.Tensor
    outer: int
    middle: int
    inner: tuple[int, ...]
    pair: tuple[int, ...]


class Extent(NamedTuple):
    """The sizes of a part besides its width, and the number of its programs."""

    middle: int
    inner: int
    programs: int


@triton.jit
def _load(place, outer, middle, inner, pairs, mask, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the second numbers of the pairs of some rows in fp32, both [rows, pairs].

    A row that all rows share is loaded by each, from the cache: its layout is theirs then, and a thread loads 16 bytes.
    Where it has one number per pair, it is loaded once, [1, pairs]. Otherwise it would pass through shared memory.
    """
    start = place.memory + outer * place.outer + middle * place.middle
    half: tl.constexpr = pairs.shape[1]
    inside = pairs < WIDTH // 2
    if len(place.inner) > 0:
        start += inner * place.inner[0]
        inside = mask & inside
    if len(place.pair) > 0:
        first = tl.load(start + pairs * place.pair[0], mask=inside, other=0.0).to(tl.float32)
        second = first
    elif INTERLEAVED:
        columns = tl.arange(0, 2 * half).to(tl.int64)[None, :]
        row = tl.load(start + columns, mask=mask & (columns < WIDTH), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(row, (row.shape[0], half, 2)))
    else:
        first = tl.load(start + pairs, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(start + pairs + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _mean(first, second, count, ACROSS: tl.constexpr):
    """The mean of the rows, [rows, 1], or of all of them, as one number."""
    sums = tl.sum(first, 1) + tl.sum(second, 1)
    if ACROSS:
        return tl.sum(sums, 0) / count
    else:  # Triton would compile what follows the branch that returns
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

    start = out.memory + outer * out.outer + middle * out.middle + inner * out.inner[0]
    dtype = out.memory.dtype.element_ty
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF).to(tl.int64)[None, :]
        row = tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))
        tl.store(start + columns, row.to(dtype), mask=mask & (columns < WIDTH))
    else:
        tl.store(start + pairs, first.to(dtype), mask=inside)
        tl.store(start + pairs + WIDTH // 2, second.to(dtype), mask=inside)


@triton.jit
def kernel(
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
    """Norm and rotate one tile of the part that this program falls to."""
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
