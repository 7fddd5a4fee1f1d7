"""`python -m benchmarks.step_profile [--model M] [--images N] [--device D] [--lowering L] [--top N]`.

What a full and a partial step of a model launch, by kernel: number, time, and share of the step. The names of the
attention kernels tell which back end ran.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import harmonica_rt as hrt
from benchmarks.latency.cases import case_of, geometries
from harmonica_rt.options import LOWERINGS

RUNS = 4  # before the profile: timesteps become known, and graphs are recorded


class Launched(NamedTuple):
    """A kernel (on a CPU, an operator): its name, number of launches and time in microseconds."""

    name: str
    count: int
    microseconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a full and a partial step launch, under every(2)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=main.__doc__)
    parser.add_argument("--model", choices=tuple(geometries()), default="bundled")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lowering", choices=LOWERINGS, default="fused")
    parser.add_argument("--top", type=int, default=15, help="kernels to print")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = case_of(geometries()[options.model], options.images, 6, device, dtype)
    schedule = hrt.Schedule.every(2, steps=case.steps, sites=hrt.find_sites(case.model))
    compiled = hrt.compile(case.model, schedule, lowering=options.lowering, strict=True)
    steps = profiled_steps(compiled, case.calls, device)
    for name, launched in (("full", steps[2]), ("partial", steps[3])):
        total = sum(each.microseconds for each in launched)
        count = sum(each.count for each in launched)
        print(f"\n{case.name}, {options.lowering}, a {name} step: {count} launches, {total / 1e3:.3f} ms")
        for each in launched[: options.top]:
            print(f"{each.count:5d} x {each.microseconds:9.1f} us {each.microseconds / total:6.1%}  {each.name[:90]}")


@torch.no_grad()
def profiled_steps(compiled: Any, calls: Sequence[dict[str, Any]], device: torch.device) -> list[list[Launched]]:
    """For each step of a run, what it launched, the longest first.

    Args:
        compiled: a compiled model.
        calls: keyword arguments of each step's call.
        device: where it runs.
    """
    timesteps = [float(call["timestep"].flatten()[0]) for call in calls]
    for _ in range(RUNS):
        compiled.reset(timesteps)
        for call in calls:
            compiled(**call)
    gpu = device.type == "cuda"
    compiled.reset(timesteps)
    found = []
    for call in calls:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
            compiled(**call)
            if gpu:
                torch.cuda.synchronize(device)
        found.append(_launched(recorded.key_averages(), gpu=gpu))
    return found


def _launched(events: Any, *, gpu: bool) -> list[Launched]:
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    chosen = [event for event in events if event.device_type == kind]
    times = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in chosen}
    listed = [Launched(event.key, event.count, times[event.key]) for event in chosen if times[event.key] > 0]
    return sorted(listed, key=lambda each: -each.microseconds)


if __name__ == "__main__":
    main()
