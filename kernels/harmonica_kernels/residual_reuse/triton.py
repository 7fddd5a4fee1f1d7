"""`residual_reuse` for CUDA: one pass over memory per `MAX_TERMS` caches."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from harmonica_kernels._checks import check_residual_sum
from harmonica_kernels._launch import Launch, Launches, Memory, OptionalTensor, Prepared
from harmonica_kernels._triton import as_rows, load, rows_at, run_rows, takes, tile_of, tiles_of, warps_of, width_of
from harmonica_kernels.residual_reuse.reference import residual_reuse_reference

# Caches per launch, by element size in bytes; with more, wide rows need a stack. Not yet measured
MAX_TERMS: Final = {2: 16, 4: 8}
Check = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[OptionalTensor], OptionalTensor, Sequence[int]], None]


@triton.jit
def load_sum(x, caches, gates, weights, codes, batch, row, columns, mask):
    """x + sum_k w_k * (gates[k] * caches[k]) in fp32, in the order of k, for what `load` takes; x may be None."""
    if x is not None:
        total = load(x, batch, row, columns, mask)
    for k in tl.static_range(len(caches)):
        term = load(caches[k], batch, row, columns, mask)
        if gates[k] is not None:
            term = load(gates[k], batch, row, columns, mask) * term
        if weights is not None:
            place = codes[k] >> 2
            term = tl.load(weights + place, mask=place >= 0, other=1.0) * term
        if x is None and k == 0:
            total = term
        else:
            total += term
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
    total = load_sum(x, caches, gates, weights, codes, batch, row, columns, mask)
    tl.store(out + index.to(tl.int64) * WIDTH + columns, total.to(out.dtype.element_ty), mask=mask)


def residual_reuse_triton(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[OptionalTensor],
    weights: OptionalTensor = None,
    places: Sequence[int] = (),
) -> torch.Tensor:
    """out = x + sum_k w_k * (gates[k] * caches[k]), equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.residual_reuse`.
    """
    out = launched_sum(_check, x, caches, gates, weights, places)
    return residual_reuse_reference(x, caches, gates, weights, places) if out is None else out


def launched_sum(
    check: Check,
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[OptionalTensor],
    weights: OptionalTensor,
    places: Sequence[int],
) -> torch.Tensor | None:
    """The sum, rounded once to the dtype of x; None if no kernel supports such tensors. `check` checks them."""
    results = run_rows(LAUNCHES, [x, *caches, *gates, flat(weights)], check, len(caches), tuple(places))
    return None if results is None else results[0]


def flat(weights: OptionalTensor) -> OptionalTensor:
    """The weights as a dense vector, as the kernels read them."""
    return None if weights is None else weights.reshape(-1).contiguous()


class Terms(NamedTuple):
    """x + sum_k w_k * (gates[k] * caches[k]), by indices in the memory of a call.

    Attributes:
        x, caches, gates: what is added up; x is None where nothing stands before the terms.
        weights: the flattened weights.
        places: of the caches' weights; empty if there are none.
    """

    x: int | None
    caches: range
    gates: range
    weights: int
    places: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """The indices of x, caches and gates, in order."""
        return *(() if self.x is None else (self.x,)), *self.caches, *self.gates

    def some(self, begin: int, end: int) -> Terms:
        """The terms from `begin` to before `end`."""
        return self._replace(
            caches=self.caches[begin:end], gates=self.gates[begin:end], places=self.places[begin:end]
        )

    @property
    def codes(self) -> tuple[int, ...] | None:
        """The places as the kernels take them.

        Triton compiles another kernel for a number that is 1 or a multiple of 16, and 4 * place + 2 never is.
        """
        return tuple(4 * place + 2 for place in self.places) or None


def shorten(memory: list[Any], terms: Terms) -> tuple[list[Launch], Terms]:
    """The same sum, bit for bit, with at most `MAX_TERMS` caches left; earlier ones are added to x in fp32.

    Args:
        memory: all tensors of the call, x first; intermediate results are appended.
        terms: the sum.

    Returns:
        Launches that add up the earlier caches, and what is left.
    """
    most, shape = MAX_TERMS[memory[0].element_size()], memory[0].shape
    launches = []
    while (count := len(terms.caches)) > most:
        x = len(memory)
        memory.append(torch.empty(shape, dtype=torch.float32, device="meta"))
        launches.append(launch(memory, terms.some(0, most), x))
        terms = terms.some(most, count)._replace(x=x)
    return launches, terms


def launch(memory: list[Any], terms: Terms, out: int) -> Launch:
    """The launch that adds up `terms`."""
    x, count = memory[out], len(terms.caches)
    width = width_of(x)
    tile = tile_of(width)
    rows, strides = as_rows(x.shape, [memory[index] for index in terms.all])
    places, numbers = list(zip(terms.all, strides, strict=True)), (rows, x.numel() // width, width, *tile)
    codes, weights, begin = terms.codes, terms.weights, int(terms.x is not None)

    def arguments(memory: Memory) -> tuple[Any, ...]:
        found = rows_at(memory, places)
        first = found[0] if begin else None
        summed, gated = tuple(found[begin : begin + count]), tuple(found[begin + count :]) or (None,) * count
        return memory[out], first, summed, gated, memory[weights] if codes else None, codes, *numbers

    return Launch(_kernel, tiles_of(x), warps_of(math.prod(tile)), arguments)


def _prepare(tensors: Sequence[Any], check: Check, caches: int, places: tuple[int, ...]) -> Prepared | None:
    x, out = tensors[0], len(tensors)
    check(x, tensors[1 : caches + 1], tensors[caches + 1 : -1], tensors[-1], places)
    if not takes(x):
        return None
    terms = Terms(0, range(1, caches + 1), range(caches + 1, out - 1), out - 1, places)
    memory = [*tensors, torch.empty(x.shape, dtype=x.dtype, device="meta")]
    launches, left = shorten(memory, terms)
    return Prepared.of(memory[out:], 1, [*launches, launch(memory, left, out)])


def _check(
    x: torch.Tensor,
    caches: Sequence[torch.Tensor],
    gates: Sequence[OptionalTensor],
    weights: OptionalTensor,
    places: Sequence[int],
) -> None:
    check_residual_sum("residual_reuse", x, caches, gates, weights, places)


LAUNCHES: Final = Launches(_prepare)
