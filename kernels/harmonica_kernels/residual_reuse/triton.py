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
Check = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[OptionalTensor]], None]


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
    x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[OptionalTensor]
) -> torch.Tensor:
    """out = x + sum_k gates[k] * caches[k], equal to the reference bit for bit.

    Shapes, dtypes and errors are those of `harmonica_kernels.residual_reuse`.
    """
    out = launched_sum(_check, x, caches, gates)
    return residual_reuse_reference(x, caches, gates) if out is None else out


def launched_sum(
    check: Check, x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[OptionalTensor]
) -> torch.Tensor | None:
    """The sum, rounded once to the dtype of x; None if no kernel supports such tensors. `check` checks them."""
    results = run_rows(LAUNCHES, [x, *caches, *gates], check, len(caches))
    return None if results is None else results[0]


class Terms(NamedTuple):
    """x + sum_k gates[k] * caches[k], by indices in the memory of a call."""

    x: int
    caches: range
    gates: range

    @property
    def all(self) -> tuple[int, ...]:
        """All indices, in order."""
        return self.x, *self.caches, *self.gates


def shorten(memory: list[Any], caches: int) -> tuple[list[Launch], Terms]:
    """The same sum, bit for bit, with at most `MAX_TERMS` caches left; earlier ones are added to x in fp32.

    Args:
        memory: x, the caches, their gates, and any other tensors; intermediate results are appended.
        caches: number of caches.

    Returns:
        Launches that add up the earlier caches, and what is left.
    """
    most, shape = MAX_TERMS[memory[0].element_size()], memory[0].shape
    x, launches, begin = 0, [], 1
    while caches + 1 - begin > most:
        some = Terms(x, range(begin, begin + most), range(caches + begin, caches + begin + most))
        x = len(memory)
        memory.append(torch.empty(shape, dtype=torch.float32, device="meta"))
        launches.append(_launch(memory, some, x))
        begin += most
    return launches, Terms(x, range(begin, caches + 1), range(caches + begin, 2 * caches + 1))


def _launch(memory: list[Any], terms: Terms, out: int) -> Launch:
    """The launch that adds up `terms`."""
    x, count = memory[out], len(terms.caches)
    width = width_of(x)
    tile = tile_of(width)
    rows, strides = as_rows(x.shape, [memory[index] for index in terms.all])
    places, numbers = list(zip(terms.all, strides, strict=True)), (rows, x.numel() // width, width, *tile)

    def arguments(memory: Memory) -> tuple[Any, ...]:
        first, *others = rows_at(memory, places)
        return memory[out], first, tuple(others[:count]), tuple(others[count:]), *numbers

    return Launch(_kernel, tiles_of(x), warps_of(math.prod(tile)), arguments)


def _prepare(tensors: Sequence[Any], check: Check, caches: int) -> Prepared | None:
    x = tensors[0]
    check(x, tensors[1 : caches + 1], tensors[caches + 1 :])
    if not takes(x):
        return None
    out = len(tensors)
    memory = [*tensors, torch.empty(x.shape, dtype=x.dtype, device="meta")]
    launches, left = shorten(memory, caches)
    return Prepared.of(memory[out:], 1, [*launches, _launch(memory, left, out)])


def _check(x: torch.Tensor, caches: Sequence[torch.Tensor], gates: Sequence[OptionalTensor]) -> None:
    check_residual_sum("residual_reuse", x, caches, gates)


LAUNCHES: Final = Launches(_prepare)
