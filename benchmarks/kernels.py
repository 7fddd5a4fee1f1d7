"""The CPU's residual_reuse ops: share of copy bandwidth, and speed against eager and compiled PyTorch.

2048 rows of 1152, gates [B, 1, D] cut from one tensor as adaLN makes them. Each round takes other tensors in turn, so
that none is in the cache. Results are compared with the reference first: no figure is given for a wrong one.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.rows import Row
from benchmarks.timing import Spread, interleaved
from harmonica_kernels import residual_reuse, residual_reuse_norm_modulate
from harmonica_kernels.residual_reuse.reference import residual_sum

BATCH, TOKENS, WIDTH = 2, 1024, 1152
COLD_BYTES = 128 << 20  # of arguments in turn: more than last-level caches hold


class Arguments(NamedTuple):
    """Of both ops; scale and shift of the second only."""

    x: Tensor
    caches: list[Tensor]
    gates: list[Tensor]
    scale: Tensor
    shift: Tensor


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Measure both ops in fp32 and bf16 for 1, 2, 4 and 8 caches."""
    _keep_freed_pages()
    rows: list[Row] = []
    for dtype, count in itertools.product((torch.float32, torch.bfloat16), (1, 8) if quick else (1, 2, 4, 8)):
        rows += _residual_reuse(dtype, count, repeats)
        rows += _norm_modulate(dtype, count, repeats)
    return rows


@torch.no_grad()
def _residual_reuse(dtype: torch.dtype, count: int, repeats: int) -> list[Row]:
    def op(a: Arguments) -> tuple[Tensor, ...]:
        return (residual_reuse(a.x, a.caches, a.gates),)

    def reference(a: Arguments) -> tuple[Tensor, ...]:
        return (residual_sum(a.x, a.caches, a.gates).to(dtype),)

    def eager(a: Arguments) -> tuple[Tensor, ...]:
        return (_eager_sum(a),)

    # Op by op, a cache is read and its product written (2 tensors of traffic), then product and sum are read and the
    # new sum is written (3 more): 5 K against the K + 2 of one pass.
    bound = 5 * count / (count + 2)
    return _compare("residual_reuse", dtype, count, repeats, (op, reference, eager), count + 2, bound, "at least 0.85")


@torch.no_grad()
def _norm_modulate(dtype: torch.dtype, count: int, repeats: int) -> list[Row]:
    def op(a: Arguments) -> tuple[Tensor, ...]:
        return residual_reuse_norm_modulate(a.x, a.caches, a.gates, scale=a.scale, shift=a.shift)

    def reference(a: Arguments) -> tuple[Tensor, ...]:
        hidden = residual_sum(a.x, a.caches, a.gates)
        normed = functional.layer_norm(hidden, (WIDTH,))
        return hidden.to(dtype), (normed * (1 + a.scale.to(hidden.dtype)) + a.shift.to(hidden.dtype)).to(dtype)

    def eager(a: Arguments) -> tuple[Tensor, ...]:
        hidden = _eager_sum(a)
        return hidden, functional.layer_norm(hidden, (WIDTH,)) * (1 + a.scale) + a.shift

    # The norm, the product and the sum each read and write a tensor more.
    bound = (5 * count + 6) / (count + 3)
    return _compare(
        "residual_reuse_norm_modulate", dtype, count, repeats, (op, reference, eager), count + 3, bound, "at least 0.7"
    )


def _compare(
    name: str,
    dtype: torch.dtype,
    count: int,
    repeats: int,
    providers: tuple[Callable[[Arguments], tuple[Tensor, ...]], ...],
    tensors: int,
    bound: float,
    target: str,
) -> list[Row]:
    op, reference, eager = providers
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    size = dtype.itemsize * BATCH * TOKENS * WIDTH
    in_turn = [_draw(dtype, count) for _ in range(1 + COLD_BYTES // (size * (count + 1)))]
    tolerance = 16 * torch.finfo(dtype).eps
    for provider in (op, compiled):
        torch.testing.assert_close(provider(in_turn[0]), reference(in_turn[0]), rtol=tolerance, atol=tolerance)

    halves = [(torch.ones(tensors * size // 2, dtype=torch.uint8), torch.empty(tensors * size // 2, dtype=torch.uint8))]
    while len(halves) * tensors * size < COLD_BYTES:
        halves.append((halves[0][0].clone(), halves[0][1].clone()))
    copies = itertools.cycle(halves)

    def copy() -> None:
        source, destination = next(copies)
        destination.copy_(source)

    def cold(provider: Callable[[Arguments], tuple[Tensor, ...]]) -> Callable[[], None]:
        arguments: Iterator[Arguments] = itertools.cycle(in_turn)

        def call() -> None:
            provider(next(arguments))

        return call

    seconds = interleaved({"copy": copy, "op": cold(op), "eager": cold(eager), "compiled": cold(compiled)}, repeats)

    case = f"{name}, {BATCH * TOKENS} x {WIDTH} {str(dtype).removeprefix('torch.')}, K = {count}"
    took = Spread.of(seconds["op"])
    rows = [Row("kernels", case, "none", "op", took.p50, "s", took.p20, took.p80, repeats)]
    figures = [
        ("bandwidth / copy bandwidth", "copy", 1.0, target),
        ("speed against eager / traffic bound", "eager", bound, None),
        ("speed against the compiled reference", "compiled", 1.0, "at least 0.95"),
    ]
    for metric, other, divisor, wanted in figures:
        ratio = Spread.of([a / b / divisor for a, b in zip(seconds[other], seconds["op"], strict=True)])
        rows.append(Row("kernels", case, "none", metric, ratio.p50, "ratio", ratio.p20, ratio.p80, repeats, wanted))
    return rows


def _eager_sum(a: Arguments) -> Tensor:
    total = a.x
    for cache, gate in zip(a.caches, a.gates, strict=True):
        total = total + gate * cache
    return total


def _draw(dtype: torch.dtype, count: int) -> Arguments:
    x, *caches = (torch.randn(BATCH, TOKENS, WIDTH).to(dtype) for _ in range(count + 1))
    scale, shift, *gates = torch.randn(BATCH, 1, (count + 2) * WIDTH).to(dtype).chunk(count + 2, dim=-1)
    return Arguments(x, caches, gates, scale, shift)


def _keep_freed_pages() -> None:
    """Have glibc keep the memory of freed results, in place of a page fault for every 4 KiB of the next result."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
