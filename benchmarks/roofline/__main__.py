"""`python -m benchmarks roofline [--models M ...] [--images N ...] [--lowerings L ...] [--kernels L] [--save] ...`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmarks.latency.__main__ import SMALL
from benchmarks.latency.cases import geometries
from benchmarks.roofline import prologue, results, show
from benchmarks.roofline.cases import MetaCase, meta_case
from benchmarks.roofline.gpus import gpus
from benchmarks.roofline.kernel import Kernel
from benchmarks.roofline.predict import rows_of
from benchmarks.roofline.programs import LOWERINGS, UNCACHED, programs_of, uncached
from harmonica_rt.plan.plan import build_plan

SCHEDULES = ("every(2)", "released", "learned")
PARTS = ("full", "partial", "prologue", "timestep")


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict step times on GPUs from the lowered graphs; nothing is measured, and no GPU is needed.

    With --kernels, list the kernels of one program instead. With --save, keep the rows in results/; saved rows of
    other cases are kept.
    """
    known = tuple(geometries())
    parser = argparse.ArgumentParser(prog="python -m benchmarks roofline", description=main.__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=known, metavar="M", help=f"models: {', '.join(known)} (default: all large ones)"
    )
    parser.add_argument("--images", nargs="+", type=int, default=(1, 8), metavar="N", help="batches (default: 1 and 8)")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, metavar="S")
    every = (*UNCACHED, *LOWERINGS)
    parser.add_argument(
        "--lowerings", nargs="+", choices=every, default=every, metavar="L", help=f"lowerings: {', '.join(every)}"
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        choices=tuple(gpus()),
        default=["H100 SXM"],
        metavar="G",
        help=f"shown: {', '.join(gpus())}",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--flux-blocks", nargs=2, type=int, default=(19, 38), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--kernels", choices=every, metavar="L", help="list the kernels of a step under this lowering")
    parser.add_argument("--part", choices=PARTS, default="full", help="of which step, or of what is before the steps")
    parser.add_argument("--top", type=int, metavar="N", help="with --kernels: the N kinds that take most of the time")
    parser.add_argument("--quick", action="store_true", help="a trial: small models")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{results.PATH.name}")
    options = parser.parse_args(arguments)
    if options.steps < 2 or min(options.images) < 1:
        parser.error("--steps must be at least 2 and --images at least 1")
    if options.kernels:
        _list(options)
        return
    found: list[results.Row] = []
    for case in _cases(options):
        fitting = [name for name in options.schedules if name in case.schedules]
        for index, schedule in enumerate(fitting):
            lowerings = [name for name in options.lowerings if index == 0 or name not in UNCACHED]
            found += rows_of(case, schedule, lowerings)
        if options.save:
            results.save(found, results.PATH)
    print(show.table(found, options.gpus))
    if options.save:
        print(f"written to {results.PATH}")


def _cases(options: argparse.Namespace) -> Iterator[MetaCase]:
    chosen = geometries(tuple(options.flux_blocks))
    large = [name for name in chosen if name not in SMALL]
    for model in options.models or (SMALL if options.quick else large):
        for images in options.images[:1] if options.quick or options.kernels else options.images:
            yield meta_case(chosen[model], images, options.steps, torch.bfloat16)


def _list(options: argparse.Namespace) -> None:
    gpu = gpus()[options.gpus[0]]
    for case in _cases(options):
        kernels = _kernels(case, options)
        print(f"{case.name}, {options.kernels}, {options.part}: {len(kernels)} kernels")
        if options.top is None:
            print(show.listing(kernels, gpu))
            continue
        print(f"{show.NOTICE} {gpu.name}")
        for name, number, seconds, share in show.top(kernels, gpu, options.top):
            print(f"{1e6 * seconds:10.1f} us {share:6.1%}  {number:4d} x {name}")


def _kernels(case: MetaCase, options: argparse.Namespace) -> list[Kernel]:
    if options.kernels in UNCACHED:
        return uncached(options.kernels, case.captured)
    schedule = next(case.schedules[name] for name in options.schedules if name in case.schedules)
    plan = build_plan(case.captured, schedule)
    programs = programs_of(options.kernels, plan, case.roles)
    if options.part in ("full", "partial"):
        wanted = [p for p, pattern in enumerate(plan.patterns) if bool(pattern.reuse) == (options.part == "partial")]
        return programs.kernels[wanted[0]] if wanted else []
    if programs.prologue is None:
        return []
    of = prologue.of_run if options.part == "prologue" else prologue.of_step
    return of(programs.prologue, plan)


if __name__ == "__main__":
    main()
