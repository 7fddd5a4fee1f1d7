"""Times a pipeline uncached and compiled, in turn: whole runs, and the denoiser calls in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from harmonica_rt.api import CompiledModel
from harmonica_rt.changes import Changes
from harmonica_rt.pipelines.install import denoiser_module, put_temporarily


@dataclass(frozen=True)
class Latency:
    """Seconds per round, until the device is done: of the whole pipeline call, and of all denoiser calls in it."""

    pipeline: tuple[float, ...]
    denoiser: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Two latencies from interleaved rounds, and the theoretical speed-up of the plan."""

    uncached: Latency
    compiled: Latency
    theoretical: float

    @property
    def pipeline_speedup(self) -> float:
        """Median over rounds of uncached / compiled, whole pipeline."""
        return _median_ratio(self.uncached.pipeline, self.compiled.pipeline)

    @property
    def denoiser_speedup(self) -> float:
        """Median over rounds of uncached / compiled, denoiser calls."""
        return _median_ratio(self.uncached.denoiser, self.compiled.denoiser)

    @property
    def realised(self) -> float:
        """Denoiser speed-up as a fraction of the theoretical one."""
        return self.denoiser_speedup / self.theoretical


def compare(
    pipeline: Any,
    compiled: CompiledModel,
    generate: Callable[[], object],
    *,
    repeats: int,
    begun: Callable[[int], object] | None = None,
) -> Comparison:
    """Time `generate` with the plain denoiser and with `compiled` in turn, after a warm-up run of each.

    Args:
        pipeline: the pipeline that `generate` calls.
        compiled: its compiled denoiser.
        generate: runs the pipeline once, always with the same arguments.
        repeats: number of timed rounds, at least 1.
        begun: called with the number of each timed round as it begins, from 1.
    """
    samples: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(repeats + 1):
        if begun is not None and number > 0:
            begun(number)
        for use_plan in (False, True):
            changes = Changes()
            with changes, changes:
                put_temporarily(pipeline, compiled if use_plan else None, changes)
                samples[use_plan].append(_run(denoiser_module(pipeline), generate))
    plain, planned = (list(zip(*samples[key][1:], strict=True)) for key in (False, True))
    theoretical = compiled.report().plans[-1].theoretical_speedup
    return Comparison(Latency(plain[0], plain[1]), Latency(planned[0], planned[1]), theoretical)


def median(seconds: tuple[float, ...]) -> float:
    """The median."""
    return float(np.median(seconds))


def spread(seconds: tuple[float, ...]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    low, high = np.percentile(seconds, [20, 80])
    return float(low), float(high)


def _run(model: nn.Module, generate: Callable[[], object]) -> tuple[float, float]:
    device = next(model.parameters()).device
    with _call_times(model, device) as calls:
        started = _now(device)
        generate()
        took = _now(device) - started
    return took, sum(calls)


def _now(device: torch.device) -> float:
    """A clock's seconds, read once the device has finished its work: calls on a GPU return earlier."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _call_times(model: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """A list that receives the seconds of each call of `model` within this block, however it is called."""
    begun: list[float] = []
    took: list[float] = []
    before = model.register_forward_pre_hook(lambda *_: begun.append(_now(device)))
    after = model.register_forward_hook(lambda *_: took.append(_now(device) - begun.pop()))
    try:
        yield took
    finally:
        before.remove()
        after.remove()


def _median_ratio(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return float(np.median([x / y for x, y in zip(a, b, strict=True)]))
