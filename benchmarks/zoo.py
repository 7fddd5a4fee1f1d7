"""Times the compile of every transformer class of diffusers with `fused` at its published geometry.

Models and calls are on the meta device, since compiling uses no values. A class that reads values of its call (lengths
in masks) or has flex attention cannot be traced there: it is compiled on the CPU, with parameters that are one number
expanded to their shape, so that they take no memory. `python -m benchmarks.zoo` writes docs/zoo.md: which classes work
at tiny sizes, with the seconds of the last saved benchmark.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils import _pytree as pytree

import harmonica_rt as hrt
from benchmarks.rows import RESULTS, Row, read
from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.errors import CaptureError
from harmonica_rt.lower import lower
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import build_plan
from tests.zoo.entry import Entry, calls_of, model_of
from tests.zoo.run import STEPS, run_level
from tests.zoo.run import run as run_tiny
from tests.zoo.table import NO_DENOISER, ZOO

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
QUICK = ("DiTTransformer2DModel", "FluxTransformer2DModel")


def cases(*, quick: bool) -> list[str]:
    """The classes that can be compiled. Each gets its own process, since a second compile finds torch's caches warm."""
    return [name for name, entry in ZOO.items() if entry.failure is None and (name in QUICK or not quick)]


def run(*, repeats: int, quick: bool, only: str) -> list[Row]:
    """Compile the class named `only`, or each class whose name contains it, once."""
    del repeats
    names = [only] if only in cases(quick=quick) else [name for name in cases(quick=quick) if only in name]
    return [row for name in names for row in _rows(name, ZOO[name])]


def _rows(name: str, entry: Entry) -> list[Row]:
    with torch.device("meta"):
        model = model_of(name, entry.real)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    case = f"{name}, {billions:.1f} G parameters"
    try:
        seconds = compile_seconds(model, entry, "meta")
    except CaptureError as error:
        print(f"{name}: {error.failure.detail}")
        seconds = compile_seconds(without_memory(name, entry), entry, "cpu")
        case += ", on the CPU"
    parts = [Row("zoo", case, "every(2), 20 steps", part, value, "s") for part, value in seconds.items()]
    total = Row("zoo", case, "every(2), 20 steps", "compile", sum(seconds.values()), "s", target="at most 60")
    return [total, *parts]


def without_memory(name: str, entry: Entry) -> nn.Module:
    """The model with its buffers, and with each parameter expanded from one number."""
    with accelerate.init_empty_weights(include_buffers=False):
        model: nn.Module = model_of(name, entry.real)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            number = torch.full((), 0.01, dtype=parameter.dtype)
            setattr(module, key, nn.Parameter(number.expand(parameter.shape), requires_grad=False))
    return model


def compile_seconds(model: nn.Module, entry: Entry, device: str) -> dict[str, float]:
    """Seconds of each part of a compile, for 20 steps of which every second one reuses all sites.

    Raises:
        CaptureError: the model cannot be captured on this device.
    """
    kwargs: dict[str, Any] = calls_of(entry, model, entry.size, 1)[0]
    call = CallConvention(model).normalise((), pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), kwargs))
    schedule = hrt.Schedule.every(2, steps=20, sites=hrt.find_sites(model))
    times = [time.perf_counter()]
    captured = capture(model, call, schedule.sites)
    times.append(time.perf_counter())
    plan = build_plan(captured, schedule)
    check_plan(plan)
    times.append(time.perf_counter())
    lower("fused", plan, roles(call))
    times.append(time.perf_counter())
    spans = [end - start for start, end in itertools.pairwise(times)]
    return dict(zip(("capture", "plan", "lower"), spans, strict=True))


def table_row(name: str, entry: Entry, seconds: str) -> str:
    """The table row of one class, which is run at its tiny size."""
    if entry.failure is not None:
        return f"| `{name}` | | no: {entry.failure.why}. Upstream: {entry.failure.upstream} | | | | |"
    outcome = run_tiny(name, entry)
    for level in ("output",) if entry.no_span else ("span", "output"):
        run_level(name, entry, level)
    kinds = ", ".join(f"`{kind}`" for kind in outcome.kinds)
    speedup, spans = outcome.fused.plans[0].theoretical_speedup, entry.no_span or "yes"
    return f"| `{name}` | {kinds} | yes | {spans} | {outcome.schedule.cur:.0%} | {speedup:.2f}x | {seconds} |"


def page(lines: Sequence[str]) -> str:
    """The text of docs/zoo.md."""
    works = sum(entry.failure is None for entry in ZOO.values())
    spans = sum(entry.failure is None and entry.no_span is None for entry in ZOO.values())
    others = "\n".join(f"- `{name}`: {reason}." for name, reason in NO_DENOISER.items())
    return f"""# The zoo

{works} of the {len(ZOO)} transformer classes that diffusers exports are captured and compiled. The tests run each
as a model of about two blocks with random parameters, under a random schedule of {STEPS} steps: `plain` equals the
reference bit for bit on a CPU, `fused` is within the measured tolerance, and exactly the entries that the schedule
says are reused. CUR and theoretical speed-up are those of that schedule and that tiny model. The seconds are those of
one compile at the published geometry (`python -m benchmarks zoo`), on the meta device. A star marks the classes that
read values (lengths of prompts, in masks) or have flex attention: they were compiled on the CPU, with parameters
expanded from one number. `benchmarks/results/zoo.json` names the machine.

The output is a site of all {works}, and lists of blocks are spans of {spans}. The tests check both in the same way,
with two weights per entry.

Written by `python -m benchmarks.zoo`.

| class | sites | compiled | spans | CUR | theoretical | seconds to compile |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

Not counted, because they denoise nothing:

{others}
"""


def _saved_seconds() -> dict[str, str]:
    return {
        row["case"].partition(",")[0]: f"{row['value']:.0f}" + "*" * row["case"].endswith("CPU")
        for row in read(RESULTS / "zoo.json")
        if row["metric"] == "compile"
    }


def main() -> None:
    """Write docs/zoo.md."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns about its own names
        seconds = _saved_seconds()
        lines = []
        for name, entry in ZOO.items():
            lines.append(table_row(name, entry, seconds.get(name, "")))
            print(lines[-1], flush=True)
        PAGE.write_text(page(lines))


if __name__ == "__main__":
    main()
