"""Times whole runs in turn, single steps, and how long the host is busy with a step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.latency.nvml import Conditions, Sensor
from benchmarks.latency.providers.base import Runner

Mark = Any
"""A point in time: a float on the CPU, an event on a GPU."""


class CpuClock:
    """Points in time on the CPU, where a call returns when its work is done."""

    def mark(self) -> Mark:
        """The current time."""
        return time.perf_counter()

    def wait(self) -> None:
        """Wait until all work is done; on the CPU it always is."""

    def between(self, first: Mark, second: Mark) -> float:
        """Seconds between two marks; call `wait` first."""
        return float(second - first)


class CudaClock:
    """Points in time in the current stream of a GPU.

    Args:
        device: the GPU; None for the current one.
        cuda: `torch.cuda`, or a stand-in for it.
    """

    def __init__(self, device: torch.device | None = None, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda

    def mark(self) -> Mark:
        """The time at which the work issued to the stream so far is done."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait until all work is done."""
        self._cuda.synchronize(self._device)

    def between(self, first: Mark, second: Mark) -> float:
        """Seconds between two marks; call `wait` first."""
        return float(first.elapsed_time(second)) / 1000.0


Clock = CpuClock | CudaClock


def use(device: torch.device) -> None:
    """Make a GPU the current one, because peers and graphs of torch.compile launch on the current device."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Samples:
    """What was measured of one runner, one entry per round.

    Attributes:
        seconds: seconds of whole runs, from the first step's call until all work is done; `reset` is not included.
        conditions: state of the GPU around each run; empty without NVML.
        steps: seconds of each step, `[rounds][steps]`.
        host: seconds until each step's call returned, its work in progress or done, `[rounds][steps]`.
    """

    seconds: list[float] = field(default_factory=list)
    conditions: list[Conditions] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    host: list[list[float]] = field(default_factory=list)

    def step_median(self, chosen: tuple[bool, ...]) -> float | None:
        """Median seconds of the chosen steps without the first, which also runs the prologue; None for no steps."""
        return _median(self.steps, chosen)

    def host_median(self) -> float | None:
        """Median seconds of a step's call on the host, without the first step; None if nothing was measured."""
        return _median(self.host, (True,) * len(self.host[0])) if self.host else None


def interleave(
    runners: Mapping[str, Runner], repeats: int, clock: Clock, sensor: Sensor | None = None
) -> dict[str, Samples]:
    """Time whole runs and then single steps, every runner once per round; rounds start with different runners.

    Args:
        runners: the runners by name.
        repeats: rounds of whole runs; steps get at most three rounds.
        clock: the clock of their device.
        sensor: reads the state of the GPU around each run; None for no such readings.
    """
    samples = {name: Samples() for name in runners}
    names = list(runners)
    for turn in range(repeats):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            _whole(runners[name], samples[name], clock, sensor)
    for _ in range(min(repeats, 3)):
        for name, runner in runners.items():
            _stepwise(runner, samples[name], clock)
    return samples


@torch.no_grad()
def _whole(runner: Runner, samples: Samples, clock: Clock, sensor: Sensor | None) -> None:
    runner.reset()
    clock.wait()
    before = sensor.snapshot() if sensor is not None else None
    started = time.perf_counter()
    for step in range(runner.task.case.steps):
        runner.step(step)
    clock.wait()
    samples.seconds.append(time.perf_counter() - started)
    if sensor is not None and before is not None:
        samples.conditions.append(Conditions(before, sensor.snapshot()))


@torch.no_grad()
def _stepwise(runner: Runner, samples: Samples, clock: Clock) -> None:
    runner.reset()
    clock.wait()
    marks, host = [clock.mark()], []
    for step in range(runner.task.case.steps):
        called = time.perf_counter()
        runner.step(step)
        host.append(time.perf_counter() - called)
        marks.append(clock.mark())
    clock.wait()
    samples.steps.append([clock.between(a, b) for a, b in itertools.pairwise(marks)])
    samples.host.append(host)


def _median(rounds: list[list[float]], chosen: tuple[bool, ...]) -> float | None:
    values = np.array(rounds)[:, 1:][:, np.array(chosen[1:], dtype=bool)]
    return float(np.median(values)) if values.size else None


def seconds_of(function: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call until its work is done."""
    clock.wait()
    started = time.perf_counter()
    function()
    clock.wait()
    return time.perf_counter() - started
