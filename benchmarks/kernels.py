"""Measures the fused ops: share of copy bandwidth, and speed against eager and compiled PyTorch.

Consecutive calls use different tensors, so that none is in the cache. On a GPU the calls of a round are one CUDA graph,
so that no launch is measured. On the CPU the memory pages that a process gets change a ratio by a tenth and more, so
the rounds are spread over several processes. Results are compared with the reference first: no figure is given for a
wrong result.
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
from dataclasses import dataclass

import torch

from benchmarks import kernel_ops, weighted_ops
from benchmarks.latency.measure import CudaClock
from benchmarks.rotary_op import NORM_ROTARY
from benchmarks.rows import Row, spread_row
from benchmarks.timing import interleaved

# [B, N, D] of x. On the CPU first few rows, whose intermediate results stay in the cache in eager PyTorch, then tensors
# of 27 MiB, which do not (and which glibc can be told to keep: 32 MiB at most).
SHAPES = {
    ("cpu", torch.float32): [(2, 1024, 1152), (6, 1024, 1152)],
    ("cpu", torch.bfloat16): [(2, 1024, 1152), (12, 1024, 1152)],
    ("cuda", torch.bfloat16): [(16, 1024, 1152), (8, 4096, 3072)],
}
PROCESSES = 5  # on the CPU
OPS = (*kernel_ops.OPS, *weighted_ops.OPS, NORM_ROTARY)
COLD_BYTES = 128 << 20  # size of the arguments used in turn: more than last-level caches hold


Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One op on tensors of one shape and dtype.

    Attributes:
        op: index of the op in `OPS`.
        shape: [B, N, D] of `x`, or of the queries.
        dtype: dtype of all arguments.
        count: number of caches, or of gates where each has several; 1 where there are none.
    """

    op: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    count: int


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Measure every op, with 1, 2, 4 and 8 caches or gates as it has any: on a GPU in bf16, else in fp32 and bf16."""
    counts = (1, 8) if quick else (1, 2, 4, 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        Case(op, shape, dtype, count)
        for (where, dtype), shapes in SHAPES.items()
        if where == device
        for shape, count, op in itertools.product(shapes, counts, range(len(OPS)))
        if count <= OPS[op].most
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
    in_turn = [op.draw(shape, dtype, device, count) for _ in range(1 + COLD_BYTES // (size * (count + 1)))]
    torch.compiler.reset()  # graphs compiled for other sizes count towards a limit
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
    rows = [spread_row("kernels", name, "none", "op", seconds["op"], "s")]
    against_compiled = "at least 0.95" if device == "cpu" else "at least 1.0"
    figures = [
        ("bandwidth / copy bandwidth", "copy", 1.0, op.targets.get(device)),
        ("speed against eager / traffic bound", "eager", op.passes(count) / op.tensors(count), op.against_eager),
        ("speed against the compiled reference", "compiled", 1.0, against_compiled),
    ]
    for metric, other, divisor, wanted in figures:
        ratios = [a / b / divisor for a, b in zip(seconds[other], seconds["op"], strict=True)]
        rows.append(spread_row("kernels", name, "none", metric, ratios, "ratio", wanted))
    return rows


def _in_turn(calls: dict[str, list[Callable[[], object]]], repeats: int) -> Seconds:
    """Seconds of one call of each provider in each round; its calls take turns."""
    turns = {name: itertools.cycle(each) for name, each in calls.items()}
    return interleaved({name: lambda turn=turn: next(turn)() for name, turn in turns.items()}, repeats)  # type: ignore[misc]


def _graphed(calls: dict[str, list[Callable[[], object]]], repeats: int) -> Seconds:
    """The same on a GPU: all calls of a provider are recorded as one graph; its seconds are divided by their number."""
    graphs, kept = {}, []  # results are kept until all is recorded, otherwise each call would overwrite the last result
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


def _keep_freed_pages() -> None:
    """Make glibc keep the memory of freed results; otherwise each 4 KiB of the next result costs a page fault."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
