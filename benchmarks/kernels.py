"""The residual_reuse ops: share of copy bandwidth, and speed against eager and compiled PyTorch.

Gates are [B, 1, D], cut from one tensor as adaLN makes them. Each call takes other tensors in turn, so that none is in
the cache. On a GPU the calls of a turn are one CUDA graph, so that no launch is measured. On the CPU the pages that a
process happens to get move a ratio by a tenth and more, so the rounds are those of several processes. Results are
compared with the reference first: no figure is given for a wrong one.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import multiprocessing
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.latency.measure import CudaClock
from benchmarks.rows import Row
from benchmarks.timing import Spread, interleaved
from harmonica_kernels import gated_residual, residual_reuse, residual_reuse_norm_modulate
from harmonica_kernels.residual_reuse.reference import residual_sum

# Batch, tokens, width. On the CPU first few rows, of which eager PyTorch keeps what it makes in
# between in the cache, then tensors of 27 MiB, which it does not (and which glibc can be told to keep: 32 MiB at most).
SHAPES = {
    ("cpu", torch.float32): [(2, 1024, 1152), (6, 1024, 1152)],
    ("cpu", torch.bfloat16): [(2, 1024, 1152), (12, 1024, 1152)],
    ("cuda", torch.bfloat16): [(16, 1024, 1152), (8, 4096, 3072)],
}
PROCESSES = 5  # on the CPU
COLD_BYTES = 128 << 20  # of arguments in turn: more than last-level caches hold


class Arguments(NamedTuple):
    """Of all ops; scale and shift of the last only."""

    x: Tensor
    caches: list[Tensor]
    gates: list[Tensor]
    scale: Tensor
    shift: Tensor


Provider = Callable[[Arguments], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Op:
    """An op and what it is measured against.

    Attributes:
        name: of the op.
        run: the op.
        reference: its definition, for Inductor to compile.
        eager: what a model does in its place.
        tensors: of the size of x that it must move, for a number of caches.
        passes: that eager PyTorch moves.
        targets: share of copy bandwidth that is asked for, by device.
        against_eager: share of the traffic bound that is asked for.
    """

    name: str
    run: Provider
    reference: Provider
    eager: Provider
    tensors: Callable[[int], int]
    passes: Callable[[int], int]
    targets: dict[str, str] = field(default_factory=dict)
    against_eager: str | None = None


Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """An op by its place in `OPS`, the shape and dtype of x, and the number of caches."""

    op: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    count: int


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Measure every op for 1, 2, 4 and 8 caches: on a GPU in bf16, elsewhere on the CPU in fp32 and bf16."""
    counts = (1, 8) if quick else (1, 2, 4, 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        Case(op, shape, dtype, count)
        for (where, dtype), shapes in SHAPES.items()
        if where == device
        for shape, count, op in itertools.product(shapes, counts, range(len(OPS)))
        if OPS[op].name != "gated_residual" or count == 1
    ]
    if device == "cuda":
        runs = [_measure(cases, device, repeats)]
    else:
        task = functools.partial(_measure, cases, device)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            runs = list(pool.map(task, [repeats] * (1 if quick else PROCESSES)))
    return [row for case, *seconds in zip(cases, *runs, strict=True) for row in _rows(case, seconds, device)]


def _measure(cases: Sequence[Case], device: str, repeats: int) -> list[Seconds]:
    """Seconds of every provider in each round, for each case."""
    if device == "cpu":
        _keep_freed_pages()
    return [_compare(case, torch.device(device), repeats) for case in cases]


@torch.no_grad()
def _compare(case: Case, device: torch.device, repeats: int) -> Seconds:
    op, count, shape, dtype = OPS[case.op], case.count, case.shape, case.dtype
    size, tensors = dtype.itemsize * math.prod(shape), op.tensors(count)
    in_turn = [_draw(shape, dtype, device, count) for _ in range(1 + COLD_BYTES // (size * (count + 1)))]
    torch.compiler.reset()  # what was compiled for other sizes counts towards a limit
    compiled = torch.compile(op.reference, fullgraph=True, dynamic=False)
    tolerance = 16 * torch.finfo(dtype).eps
    for provider in (op.run, compiled):
        torch.testing.assert_close(provider(in_turn[0]), op.reference(in_turn[0]), rtol=tolerance, atol=tolerance)

    half = torch.ones(tensors * size // 2, dtype=torch.uint8, device=device)
    halves = [(half.clone(), half.clone()) for _ in range(1 + COLD_BYTES // (tensors * size))]
    calls: dict[str, list[Callable[[], object]]] = {
        "copy": [lambda s=s, d=d: d.copy_(s) for s, d in halves],  # type: ignore[misc]
        **{
            name: [lambda p=provider, a=arguments: p(a) for arguments in in_turn]  # type: ignore[misc]
            for name, provider in (("op", op.run), ("eager", op.eager), ("compiled", compiled))
        },
    }
    return _graphed(calls, repeats) if device.type == "cuda" else _in_turn(calls, repeats)


def _rows(case: Case, runs: Sequence[Seconds], device: str) -> list[Row]:
    """The figures of a case, over the rounds of all runs."""
    op, count, (batch, tokens, width) = OPS[case.op], case.count, case.shape
    seconds = {name: [second for run in runs for second in run[name]] for name in runs[0]}
    where = "" if device == "cpu" else f", {torch.cuda.get_device_name()}"
    name = f"{op.name}, {batch * tokens} x {width} {str(case.dtype).removeprefix('torch.')}, K = {count}{where}"
    took, repeats = Spread.of(seconds["op"]), len(seconds["op"])
    rows = [Row("kernels", name, "none", "op", took.p50, "s", took.p20, took.p80, repeats)]
    against_compiled = "at least 0.95" if device == "cpu" else "at least 1.0"
    figures = [
        ("bandwidth / copy bandwidth", "copy", 1.0, op.targets.get(device)),
        ("speed against eager / traffic bound", "eager", op.passes(count) / op.tensors(count), op.against_eager),
        ("speed against the compiled reference", "compiled", 1.0, against_compiled),
    ]
    for metric, other, divisor, wanted in figures:
        ratio = Spread.of([a / b / divisor for a, b in zip(seconds[other], seconds["op"], strict=True)])
        rows.append(Row("kernels", name, "none", metric, ratio.p50, "ratio", ratio.p20, ratio.p80, repeats, wanted))
    return rows


def _in_turn(calls: dict[str, list[Callable[[], object]]], repeats: int) -> Seconds:
    """Seconds of a call of each provider in each round; every call is the next of its turn."""
    turns = {name: itertools.cycle(each) for name, each in calls.items()}
    return interleaved({name: lambda turn=turn: next(turn)() for name, turn in turns.items()}, repeats)  # type: ignore[misc]


def _graphed(calls: dict[str, list[Callable[[], object]]], repeats: int) -> Seconds:
    """The same on a GPU: seconds of a whole turn, recorded as one graph, over its number of calls."""
    graphs, kept = {}, []  # results stay until all is recorded, or every call would write where the last one did
    for name, each in calls.items():
        for call in each:
            call()  # compiles, and fills the allocator's cache
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            kept.append([call() for call in each])
    clock = CudaClock()
    seconds: Seconds = {name: [] for name in calls}
    for graph in graphs.values():
        graph.replay()
    for _ in range(repeats):
        for name, graph in graphs.items():
            started = clock.mark()
            graph.replay()
            ended = clock.mark()
            clock.wait()
            seconds[name].append(clock.between(started, ended) / len(calls[name]))
    return seconds


def _norm_modulate(hidden: Tensor, a: Arguments) -> Tensor:
    return functional.layer_norm(hidden, hidden.shape[-1:]) * (1 + a.scale.to(hidden.dtype)) + a.shift.to(hidden.dtype)


def _summed(a: Arguments) -> tuple[Tensor, ...]:
    return (residual_sum(a.x, a.caches, a.gates).to(a.x.dtype),)


def _summed_and_normed(a: Arguments) -> tuple[Tensor, ...]:
    hidden = residual_sum(a.x, a.caches, a.gates)
    return hidden.to(a.x.dtype), _norm_modulate(hidden, a).to(a.x.dtype)


def _eager_sum(a: Arguments) -> Tensor:
    total = a.x
    for cache, gate in zip(a.caches, a.gates, strict=True):
        total = total + gate * cache
    return total


def _eager_sum_and_norm(a: Arguments) -> tuple[Tensor, ...]:
    hidden = _eager_sum(a)
    return hidden, _norm_modulate(hidden, a)


# Op by op, a cache is read and its product written (2 tensors of traffic), then product and sum are read and the new
# sum is written (3 more); the norm, the product and the sum behind it each read and write a tensor more.
OPS = (
    Op(
        "gated_residual",
        lambda a: (gated_residual(a.x, a.caches[0], a.gates[0]),),
        _summed,
        lambda a: (_eager_sum(a),),
        tensors=lambda count: 3,
        passes=lambda count: 5,
        targets={"cpu": "at least 0.85", "cuda": "at least 0.9"},
    ),
    Op(
        "residual_reuse",
        lambda a: (residual_reuse(a.x, a.caches, a.gates),),
        _summed,
        lambda a: (_eager_sum(a),),
        tensors=lambda count: count + 2,
        passes=lambda count: 5 * count,
        targets={"cpu": "at least 0.85", "cuda": "at least 0.9"},
        against_eager="at least 0.8",
    ),
    Op(
        "residual_reuse_norm_modulate",
        lambda a: residual_reuse_norm_modulate(a.x, a.caches, a.gates, scale=a.scale, shift=a.shift),
        _summed_and_normed,
        _eager_sum_and_norm,
        tensors=lambda count: count + 3,
        passes=lambda count: 5 * count + 6,
        targets={"cpu": "at least 0.7", "cuda": "at least 0.9"},
    ),
)


def _draw(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, count: int) -> Arguments:
    batch, _, width = shape
    x, *caches = (torch.randn(shape, device=device).to(dtype) for _ in range(count + 1))
    chunks = torch.randn(batch, 1, (count + 2) * width, device=device).to(dtype).chunk(count + 2, dim=-1)
    scale, shift, *gates = chunks
    return Arguments(x, caches, gates, scale, shift)


def _keep_freed_pages() -> None:
    """Have glibc keep the memory of freed results, in place of a page fault for every 4 KiB of the next result."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
