"""`python -m benchmarks latency [--models M ...] [--images N ...] [--providers P ...] [--device D] [--save] ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import rows
from benchmarks.latency import results, show
from benchmarks.latency.cases import geometries
from benchmarks.latency.providers import PROVIDERS
from benchmarks.latency.run import Settings, run

SCHEDULES = ("every(2)", "released", "learned")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = ("bundled", "dit-12x384", "flux-small")  # for a CPU
ON_CPU = ("eager", "hooks", "first-block", "taylorseer", "pab", "fused")  # what `make bench` has time for
NAME = "latency"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure latency side by side; print one table, and with --save keep rows, table and plot in results/.

    Rows of other cases that are there already stay.
    """
    known = tuple(geometries())
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=known, metavar="M", help=f"of {', '.join(known)}")
    parser.add_argument("--images", nargs="+", type=int, metavar="N", help="batches, in images (default: 1 and 8)")
    parser.add_argument(
        "--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, metavar="S", help="default: all that fit"
    )
    parser.add_argument("--providers", nargs="+", choices=[*PROVIDERS, "all"], metavar="P", help=", ".join(PROVIDERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each, in turn (default: 7)")
    parser.add_argument("--flux-blocks", nargs=2, type=int, default=(19, 38), metavar=("DOUBLE", "SINGLE"))
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--alone", action=switch, help="compile time and memory, in processes apart (default: on a GPU)"
    )
    parser.add_argument("--floor", action=switch, help="floor of each step (default: on a GPU)")
    parser.add_argument("--quick", action="store_true", help="the bundled model, 4 steps: does it run at all?")
    parser.add_argument(
        "--save", action="store_true", help=f"write benchmarks/results/{NAME}-DEVICE.json, .md and .png"
    )
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.repeats < 1 or min(options.images or [1]) < 1:
        parser.error("--steps must be at least 2, --repeats and --images at least 1")
    if options.quick and options.save:
        parser.error("--quick is a trial; its rows are not for keeping")
    path = rows.RESULTS / f"{NAME}-{torch.device(options.device).type}.json"
    found = []
    for row in run(_settings(options)):
        found.append(row)
        if options.save:
            results.save(found, path)
    print(show.table(found))
    if options.save:
        kept = results.read(path)
        show.draw(kept, path.with_suffix(".png"))
        path.with_suffix(".md").write_text(f"{show.table(kept)}\n")
        print(f"written to {path}, .md and .png")


def _settings(options: argparse.Namespace) -> Settings:
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    small = ("bundled",) if options.quick else ("bundled", "flux-small")
    large = tuple(name for name in geometries() if name not in SMALL)
    providers = tuple(options.providers or (PROVIDERS if gpu else ON_CPU))
    return Settings(
        models=tuple(options.models or (large if gpu and not options.quick else small)),
        images=tuple(options.images or ((1, 8) if gpu else (1,))),
        schedules=tuple(options.schedules),
        providers=tuple(PROVIDERS) if "all" in providers else providers,
        steps=4 if options.quick else options.steps,
        repeats=options.repeats,
        device=device,
        dtype=DTYPES[options.dtype] if options.dtype else torch.bfloat16 if gpu else torch.float32,
        flux_blocks=tuple(options.flux_blocks),
        alone=gpu if options.alone is None else options.alone,
        floor=gpu if options.floor is None else options.floor,
    )


if __name__ == "__main__":
    main()
