"""Measures the host time of a step whose work is one graph: seconds from the call of the model to its return.

On a GPU this time is hidden while the device is busy; otherwise it adds to the step. Here graphs launch nothing: a
stand-in returns what it recorded. The model has DiT-XL/2's 28 blocks and 56 sites at a width of 16, so that copies of
inputs and outputs, which a GPU makes on its own, take almost no time. The baseline is the least that any host path must
do, in C++ or not: copy the latents to their fixed address, replay, copy the output for the caller.

Each step checks whether the model has changed. That check is also timed alone, and so is walking the model again after
a change. `plain_launch` adds the calls of ops outside of graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import harmonica_rt as hrt
from benchmarks import models, plain_launch, schedules
from benchmarks.rows import Row, spread_row
from harmonica_rt.api import CompiledModel
from harmonica_rt.execute.cuda_graphs import Body, Graphs, copies
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.model.watch import ModelWatch
from harmonica_rt.options import CompileOptions

STEPS = 20
RUNS = 50  # per repeat
CHECK = "check for changes of the model alone"
CHANGED = "the same check after a change, the model walked again"
TARGETS = {CHECK: "<= 3e-4"}


class IdleGraph:
    """A graph that launches nothing once it is idle."""

    def __init__(self, pool: IdlePool, body: Body) -> None:
        self._pool = pool
        self._body = body
        self._outputs: tuple[Any, ...] = ()

    def replay(self) -> tuple[Any, ...]:
        """Run the body, or return what it gave last."""
        if not self._pool.idle:
            self._outputs = self._body()
        return self._outputs


class IdlePool:
    """A pool whose graphs run until it is idle, so that all values that they leave in memory are there."""

    nbytes = 0
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.idle = False

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """Run the body."""
        return body()

    def record(self, body: Body) -> IdleGraph:
        """Keep the body."""
        return IdleGraph(self, body)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one run; called only if graphs are kept by measurement."""
        return _seconds(run)


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Seconds per step of the compiled model, and of the least that a host path must do."""
    runs, layers = (2, 4) if quick else (RUNS, 28)
    model = models.dit(layers=layers, heads=2, head_dim=8)
    calls = models.dit_calls(model, 2, STEPS)
    schedule = schedules.ten_patterns(hrt.find_sites(model), STEPS)
    pool = IdlePool()
    options = CompileOptions(strict=True, max_plans=1)
    engine = PlannedEngine(model, schedule, options, Graphs(lambda device: pool, measured=False))
    compiled = CompiledModel(model, schedule, engine, verify=False)
    timesteps = [float(call["timestep"][0]) for call in calls]

    def ours() -> list[float]:
        compiled.reset(timesteps)
        return [_seconds(lambda call=call: compiled(**call)) for call in calls]  # type: ignore[misc]

    latents = torch.empty_like(calls[0]["hidden_states"])
    outputs = (torch.zeros_like(latents),)

    def least() -> list[float]:
        return [_seconds(lambda call=call: _least(latents, call, outputs)) for call in calls]  # type: ignore[misc]

    with torch.no_grad():
        for _ in range(4):  # timesteps are forecast and graphs recorded
            ours()
        pool.idle = True
        found: dict[str, list[float]] = {"compiled model": [], "copies and replay alone": []}
        for _ in range(repeats):
            for name, provider in zip(found, (ours, least), strict=True):
                samples = sorted(second for _ in range(runs) for second in provider()[1:])
                found[name].append(samples[len(samples) // 2])
        found |= _looks(model, repeats=repeats, looks=runs * STEPS)
    case = f"DiT, {layers} blocks of width 16, batch 2"
    return [
        spread_row("host_path", case, "10 patterns", f"host, per step: {name}", samples, "s", TARGETS.get(name))
        for name, samples in found.items()
    ] + plain_launch.run(repeats=repeats, quick=quick)


def _looks(model: nn.Module, *, repeats: int, looks: int) -> dict[str, list[float]]:
    """Seconds of a check of a model that did not change, and of walking it again after a change."""
    watch = ModelWatch(model)
    watch.look()
    found: dict[str, list[float]] = {CHECK: [], CHANGED: []}
    for _ in range(repeats):
        found[CHECK].append(_seconds(lambda: [watch.look() for _ in range(looks)]) / looks)
        model.scale_of_the_benchmark = len(found[CHECK])  # type: ignore[assignment]
        found[CHANGED].append(_seconds(watch.look))
    del model.scale_of_the_benchmark
    return found


def _least(latents: torch.Tensor, call: dict[str, Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    latents.copy_(call["hidden_states"])
    return copies(outputs)


def _seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
