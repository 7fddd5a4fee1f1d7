"""Measures one provider in its own process: seconds to compile, cold and warm, and peak GPU memory.

`python -m benchmarks.latency.alone JSON` prints a line of JSON. The compile time is preparation and first run, less the
median of later runs. Cold means that the caches of Inductor and Triton on disk are empty; warm is the same again in a
new process, with the caches that the first one left.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.latency.cases import Task, case_of, geometries, schedules_of
from benchmarks.latency.measure import clock_of, seconds_of, use
from benchmarks.latency.providers import PROVIDERS

RECOMPILES = 256  # per function, so that torch.compile's limit stops no peer


@dataclass(frozen=True)
class Spec:
    """What to run, as values that JSON can hold.

    Attributes:
        model: name of a geometry.
        images: images per run.
        steps: steps per run.
        schedule: name of a schedule.
        provider: name of a provider.
        device: torch's name of the device.
        dtype: name of a dtype in `torch`.
        flux_blocks: number of double-stream and of single-stream blocks of Flux.
        computes: the step mask of a peer. It is given because the time to choose it is not compile time.
    """

    model: str
    images: int
    steps: int
    schedule: str
    provider: str
    device: str
    dtype: str
    flux_blocks: tuple[int, int]
    computes: tuple[bool, ...]


@dataclass(frozen=True)
class Alone:
    """The cost of a provider in its own process.

    Attributes:
        compile_seconds: preparation and first run, less the median of later runs.
        allocated: peak bytes of GPU memory in use, parameters included; None on a CPU.
        reserved: peak bytes of GPU memory that the allocator held; None on a CPU.
    """

    compile_seconds: float
    allocated: int | None
    reserved: int | None


def measure_here(spec: Spec) -> Alone:
    """Measure one provider in this process."""
    torch._dynamo.config.recompile_limit = RECOMPILES
    device = torch.device(spec.device)
    use(device)
    geometry = geometries(spec.flux_blocks)[spec.model]
    case = case_of(geometry, spec.images, spec.steps, device, getattr(torch, spec.dtype))
    task = Task(case, spec.schedule, schedules_of(case.model, spec.steps)[spec.schedule], spec.computes)
    clock = clock_of(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    made: list[Any] = []
    prepare = seconds_of(lambda: made.append(PROVIDERS[spec.provider].prepare(task)), clock)
    first, *later = [seconds_of(made[0].run, clock) for _ in range(5)]  # graphs are recorded in the second and third
    cuda = device.type == "cuda"
    return Alone(
        prepare + first - statistics.median(later),
        torch.cuda.max_memory_allocated(device) if cuda else None,
        torch.cuda.max_memory_reserved(device) if cuda else None,
    )


def measure_apart(spec: Spec) -> tuple[Alone, Alone]:
    """Measure cold, then warm, each in a new process; both use one new cache folder.

    Raises:
        RuntimeError: a process failed; the message has the end of its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        return _apart(spec, places), _apart(spec, places)


def _apart(spec: Spec, places: dict[str, str]) -> Alone:
    command = [sys.executable, "-m", "benchmarks.latency.alone", json.dumps(dataclasses.asdict(spec))]
    result = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{spec.provider} failed in its own process: {result.stderr.strip()[-500:]}")
    return Alone(**json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    """Measure what the argument describes, and print the result as JSON."""
    given = json.loads(sys.argv[1])
    tuples = {name: tuple(given[name]) for name in ("flux_blocks", "computes")}
    print(json.dumps(dataclasses.asdict(measure_here(Spec(**{**given, **tuples})))))


if __name__ == "__main__":
    main()
