"""`residual_reuse` for CUDA: one pass over memory per `MAX_TERMS` caches."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl

from harmonica_kernels._checks import check_residual_sum
from harmonica_kernels._launch import Launch, Launches, Memory, OptionalTensor, Prepared
from harmonica_kernels._triton import as_rows, load, rows_at, run_rows, takes, tile_of, tiles_of, warps_of, width_of
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference
from harmonica_kernels.residual_reuse.terms import Terms

# Caches per launch, by element size in bytes; with more, wide rows need a stack. Not yet measured
MAX_TERMS: Final = {2: 16, 4: 8}
Check = Callable[..., None]


@triton.jit
def load_sum(x, caches, gates, weights, codes, batch, row, columns, mask, JOINED: tl.constexpr):
    """x + sum_k gates[k] * y_k in fp32, in the order of k, for what `load` takes; without x, y_0.

    A cache whose bit of JOINED is set belongs to the same y as the one before it, and y's gate comes with its last.
    """
    if x is not None:
        total = load(x, batch, row, columns, mask)
    for k in tl.static_range(len(caches)):
        term = load(caches[k], batch, row, columns, mask)
        if weights is not None:
            place = codes[k] >> 2
            term = tl.load(weights + place, mask=place >= 0, other=1.0) * term
        if (JOINED >> k) % 2 == 0:
            y = term
        else:
            y += term
        if (JOINED >> (k + 1)) % 2 == 0:
            if gates[k] is not None:
                y = load(gates[k], batch, row, columns, mask) * y
            if x is None:
                total = y
            else:
                total += y
    return total


@triton.jit(do_not_specialize=["rows", "count"])
def _kernel(
    out,
    x,
    caches,
    gates,
    weights,
    codes,
    rows,
    count,
    JOINED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    index = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    columns = ((program % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (index < count) & (columns < WIDTH)
    batch, row = (index // rows).to(tl.int64), (index % rows).to(tl.int64)
    total = load_sum(x, caches, gates, weights, codes, batch, row, columns, mask, JOINED)
    tl.store(out + index.to(tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=mask)


def residual_reuse_triton(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[OptionalTensor],
    weights: OptionalTensor = None,
    places: Sequence[int] = (),
    counts: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + sum_k gates[k] * y_k, equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.residual_reuse`.
    """
    out = launched_sum(_check, x, caches, gates, weights, places, counts)
    return residual_reuse_reference(x, caches, gates, weights, places, counts) if out is None else out


def launched_sum(
    check: Check,
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[OptionalTensor],
    weights: OptionalTensor,
    places: Sequence[int],
    counts: Sequence[int] = (),
) -> torch.Tensor | None:
    """The sum, rounded once to the dtype of x; None if no kernel supports such tensors. `check` checks them."""
    settings = check, len(caches), len(gates), tuple(places), tuple(counts)
    results = run_rows(LAUNCHES, [x, *caches, *gates, flat(weights)], *settings)
    return None if results is None else results[0]


def flat(weights: OptionalTensor) -> OptionalTensor:
    """The weights as a dense vector, as the kernels read them."""
    return None if weights is None else weights.reshape(-1).contiguous()


def _prepare(
    tensors: Sequence[Any],
    check: Check,
    caches: int,
    gates: int,
    places: tuple[int, ...],
    counts: tuple[int, ...],
) -> Prepared | None:
    x, weights = tensors[0], 1 + caches + gates
    check(x, tensors[1 : caches + 1], tensors[caches + 1 : weights], tensors[weights], places, counts)
    terms = Terms.after_x(caches, counts or (1,) * gates, places, weights)
    if not takes(x) or terms.longest > most_terms(x):
        return None
    out = len(tensors)
    memory = [*tensors, torch.empty(x.shape, dtype=x.dtype, device="meta")]
    launches, left = shorten(memory, terms)
    return Prepared.of(memory[out:], 1, [*launches, launch(memory, left, out)])


def most_terms(x: torch.Tensor) -> int:
    """The most caches that one launch takes."""
    return MAX_TERMS[x.element_size()]


def shorten(memory: list[Any], terms: Terms) -> tuple[list[Launch], Terms]:
    """The same sum, bit for bit, with at most `MAX_TERMS` caches left; earlier ones are added to x in fp32.

    Args:
        memory: all tensors of the call, x first; intermediate results are appended.
        terms: the sum; none of its y has more than `MAX_TERMS` caches.

    Returns:
        Launches that add up the earlier caches, and what is left.
    """
    shape, most = memory[0].shape, most_terms(memory[0])
    launches: list[Launch] = []
    while True:
        some, left = terms.split(most)
        if left is None:
            return launches, some
        x = len(memory)
        memory.append(torch.empty(shape, dtype=torch.float32, device="meta"))
        launches.append(launch(memory, some, x))
        terms = left._replace(x=x)


def launch(memory: list[Any], terms: Terms, out: int) -> Launch:
    """The launch that adds up `terms`."""
    x, operands = memory[out], terms.operands
    width = width_of(x)
    tile = tile_of(width)
    rows, strides = as_rows(x.shape, [None if index is None else memory[index] for index in operands])
    places = [(index or 0, each) for index, each in zip(operands, strides, strict=True)]
    numbers = (rows, x.numel() // width, terms.joined, width, *tile)
    count, codes, weights = terms.length, terms.codes, terms.weights

    def arguments(memory: Memory) -> tuple[Any, ...]:
        first, *found = rows_at(memory, places)
        summed, gated = tuple(found[:count]), tuple(found[count:])
        return memory[out], first, summed, gated, memory[weights] if codes else None, codes, *numbers

    return Launch(_kernel, tiles_of(x), warps_of(math.prod(tile)), arguments)


def _check(*operands: Any) -> None:
    check_residual_sum("residual_reuse", *operands)


LAUNCHES: Final = Launches(_prepare)
