"""Rows of a case: its kernels under every lowering, and their times on every GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.latency.floor import other_bytes
from benchmarks.roofline import prologue
from benchmarks.roofline.cases import MetaCase
from benchmarks.roofline.gpus import Gpu, gpus, host
from benchmarks.roofline.kernel import Kernel, work
from benchmarks.roofline.programs import LOWERINGS, UNCACHED, Programs, programs_of, uncached
from benchmarks.roofline.results import FULL, PARTIAL, PROLOGUE, RUN, UNFORESEEN, Row
from benchmarks.roofline.seconds import floor_seconds, host_seconds, products_seconds, step_seconds
from harmonica_rt.options import DEFAULT_LOWERING
from harmonica_rt.plan.plan import Plan, build_plan

NO_SCHEDULE = "none"


class _Floors(NamedTuple):
    """Two lower bounds by GPU; see `Row`."""

    floor: Mapping[str, float]
    products: Mapping[str, float]


NO_FLOORS = _Floors({}, {})


@dataclass(frozen=True)
class _Part:
    """Kernels that run some times per run.

    Attributes:
        kernels: the kernels.
        copies: the kernels around their CUDA graph.
        times: how often they run in a run; as a share of the steps of their kind, it is their weight in a mean.
        floors: `floor` and `products` of a row.
        graphed: seconds of the host if they are one CUDA graph.
    """

    kernels: Sequence[Kernel]
    copies: Sequence[Kernel]
    times: int
    floors: _Floors
    graphed: float


def rows_of(case: MetaCase, schedule: str, lowerings: Sequence[str] = (*UNCACHED, *LOWERINGS)) -> Iterator[Row]:
    """The rows of a case under one of its schedules, and of the uncached model, for the given lowerings."""
    plan = build_plan(case.captured, case.schedules[schedule])
    best = programs_of(DEFAULT_LOWERING, plan, case.roles)
    floors = _floors(best)
    full = next((program for program in range(len(plan.programs)) if _is_full(plan, program)), None)
    for name in lowerings:
        if name in UNCACHED:
            kernels = uncached(name, case.captured)
            bounds = floors[full] if full is not None else NO_FLOORS
            part = _Part(kernels, (), len(plan.steps), bounds, host_seconds(kernels))
            yield _row((case.name, NO_SCHEDULE, name, FULL), [part])
            yield _run((case.name, NO_SCHEDULE, name, RUN), [part])
            continue
        programs = best if name == DEFAULT_LOWERING else programs_of(name, plan, case.roles)
        yield from _lowered_rows(case, schedule, name, plan, programs, floors)


def _lowered_rows(
    case: MetaCase,
    schedule: str,
    name: str,
    plan: Plan,
    programs: Programs,
    floors: Sequence[_Floors],
) -> Iterator[Row]:
    step = host().graphed_step
    counts = [sum(each.program == program for each in plan.steps) for program in range(len(plan.programs))]
    parts = [_Part(*each, step) for each in zip(programs.kernels, programs.around, counts, floors, strict=True)]
    for kind in (FULL, PARTIAL):
        chosen = [part for program, part in enumerate(parts) if _is_full(plan, program) == (kind == FULL)]
        if chosen:
            yield _row((case.name, schedule, name, kind), chosen)
    if programs.prologue is not None:
        before = _Part(prologue.of_run(programs.prologue, plan), (), 1, NO_FLOORS, step)
        yield _row((case.name, schedule, name, PROLOGUE), [before])
        unforeseen = prologue.of_step(programs.prologue, plan)
        yield _row(
            (case.name, schedule, name, UNFORESEEN),
            [_Part(unforeseen, (), len(plan.steps), NO_FLOORS, host_seconds(unforeseen))],
        )
        parts.append(before)
    yield _run((case.name, schedule, name, RUN), parts)


def _is_full(plan: Plan, program: int) -> bool:
    return not plan.patterns[program].reuse


def _floors(programs: Programs) -> list[_Floors]:
    """The floors of each program on each GPU, from its form without what can be hoisted, its products joined."""
    return [
        _Floors(
            {name: floor_seconds(kernels, other_bytes(step), gpu) for name, gpu in gpus().items()},
            {name: products_seconds(kernels, other_bytes(step), gpu) for name, gpu in gpus().items()},
        )
        for step, kernels in zip(programs.steps, programs.kernels, strict=True)
    ]


def _row(about: tuple[str, str, str, str], parts: Sequence[_Part]) -> Row:
    """The mean of parts over the times that they run."""
    times = sum(part.times for part in parts)
    return _summed(about, parts, [part.times / times for part in parts], times)


def _run(about: tuple[str, str, str, str], parts: Sequence[_Part]) -> Row:
    return _summed(about, parts, [part.times for part in parts], 1)


def _summed(about: tuple[str, str, str, str], parts: Sequence[_Part], weights: Sequence[float], times: int) -> Row:
    names = ("kernels", "read", "written", "flops")
    amounts = [dict(zip(names, work(part.kernels), strict=True)) | {"copies": len(part.copies)} for part in parts]
    done = {name: _weighted([amount[name] for amount in amounts], weights) for name in (*names, "copies")}
    kinds = {
        "graphs": [part.graphed for part in parts],
        "launches": [host_seconds(part.kernels) for part in parts],
    }
    floored = [(part.floors, weight) for part, weight in zip(parts, weights, strict=True) if part.floors.floor]
    return Row(
        *about,
        work={"steps": times, **done},
        host={name: _weighted(values, weights) for name, values in kinds.items()},
        seconds={name: _weighted([_device(part, gpu) for part in parts], weights) for name, gpu in gpus().items()},
        floor={name: sum(each.floor[name] * weight for each, weight in floored) for name in gpus() if floored},
        products={name: sum(each.products[name] * weight for each, weight in floored) for name in gpus() if floored},
    )


def _device(part: _Part, gpu: Gpu) -> float:
    return step_seconds((*part.copies, *part.kernels), gpu)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True))
