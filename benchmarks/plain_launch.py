"""Measures the host time of a plain launch: seconds from the call of an op to the return of the driver.

Each op has one cache and sixteen, as steps have that compute almost all or almost nothing. On a GPU the calls go to it,
few enough at a time that its queue never fills. Elsewhere Triton's own launcher hands them to a stub of the driver,
which only writes them down; that stays for the rest of a process, so the measurement has a process of its own.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import kernel_ops, rotary_op
from benchmarks.rows import Row, spread_row

COUNTS = (1, 16)
SHAPE = (2, 16, 1152)  # [B, N, D]: as wide as DiT-XL/2; the host's work does not depend on N
CALLS = 50  # at a time; the stub has room for 64 launches
ROUNDS = 20  # per repeat
TARGETS = {1: "<= 2.5e-5", 16: "<= 6e-5"}


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Seconds per call of each op; no rows without Triton, or without a GPU and a C compiler for the stub."""
    has_driver = torch.cuda.is_available() or shutil.which(os.environ.get("CC", "gcc")) is not None
    if find_spec("triton") is None or not has_driver:
        return []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_measure, repeats * (1 if quick else ROUNDS)).result()
    case = "plain launches, {} x {} x {} bfloat16".format(*SHAPE)
    return [
        spread_row("host_path", case, "none", f"host, per call: {op}, K = {count}", samples, "s", TARGETS[count])
        for (op, count), samples in found.items()
    ]


@torch.no_grad()
def _measure(rounds: int) -> dict[tuple[str, int], list[float]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    finish = torch.cuda.synchronize if device == "cuda" else _stub()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # a call with tensors of the CPU launches too
    calls: dict[tuple[str, int], Callable[[], object]] = {
        (op, count): functools.partial(getattr(torch.ops.harmonica, op).default.redispatch, keys, *args, **options)
        for count in COUNTS
        for op, (args, options) in _arguments(count, torch.device(device)).items()
    }
    for call, _ in itertools.product(calls.values(), range(2)):
        call()  # compiles
    found: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            finish()
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[key].append((time.perf_counter() - started) / CALLS)
    finish()
    return found


def _arguments(count: int, device: torch.device) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each op that takes this number of caches, by position and by name."""
    x, caches, gates, scale, shift = kernel_ops.draw(SHAPE, torch.bfloat16, device, count)
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "residual_reuse": ((x, caches, gates), {}),
        "residual_reuse_norm_modulate": ((x, caches, gates, None, None, scale, shift), {"rms": False, "eps": 1e-6}),
    }
    if count == 1:
        heads = rotary_op.NORM_ROTARY.draw(SHAPE, torch.bfloat16, device, count)
        found["gated_residual"] = (x, caches[0], gates[0]), {}
        found["norm_rotary"] = rotary_op.arguments(heads), {}
    return found


def _stub() -> Callable[[], object]:
    """Install the stub; return what empties it."""
    from tests.kernels.stub_driver import StubDriver  # here, since it needs Triton and a C compiler

    return StubDriver().clear
