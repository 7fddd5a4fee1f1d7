"""`python -m benchmarks latency [--models M ...] [--images N ...] [--providers P ...] [--device D] [--save] ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import rows
from benchmarks.latency import results, show
from benchmarks.latency.cases import geometries
from benchmarks.latency.providers import PROVIDERS
from benchmarks.latency.run import run
from benchmarks.latency.settings import Selection, Settings

SCHEDULES = ("every(2)", "released", "learned")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = ("bundled", "dit-12x384", "flux-small")  # fit a CPU
ON_CPU = ("eager", "hooks", "first-block", "taylorseer", "pab", "fused")  # fast enough for `make bench`
NAME = "latency"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure latency side by side and print a table; with --save, keep rows, table and plot in results/.

    Saved rows of other cases are kept.
    """
    known = tuple(geometries())
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=main.__doc__)
    parser.add_argument("--models", nargs="+", choices=known, metavar="M", help=f"models: {', '.join(known)}")
    parser.add_argument(
        "--images", nargs="+", type=int, metavar="N", help="batches, in images (default: 1 and 8 on a GPU, 1 on a CPU)"
    )
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        default=SCHEDULES,
        metavar="S",
        help=f"schedules: {', '.join(SCHEDULES)} (default: all that fit)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=[*PROVIDERS, "all"],
        metavar="P",
        help=f"providers: {', '.join(PROVIDERS)}, all",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each provider (default: 7)")
    parser.add_argument("--flux-blocks", nargs=2, type=int, default=(19, 38), metavar=("DOUBLE", "SINGLE"))
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--alone", action=switch, help="measure compile time and memory in separate processes (default: on a GPU)"
    )
    parser.add_argument("--floor", action=switch, help="measure the floor of each step (default: on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a trial: the bundled model, 4 steps")
    parser.add_argument(
        "--save", action="store_true", help=f"write benchmarks/results/{NAME}-DEVICE.json, .md and .png"
    )
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.repeats < 1 or min(options.images or [1]) < 1:
        parser.error("--steps must be at least 2, --repeats and --images at least 1")
    if options.quick and options.save:
        parser.error("--quick is a trial, whose rows are not kept; leave out --save")
    path = rows.RESULTS / f"{NAME}-{torch.device(options.device).type}.json"
    found = []
    for row in run(_selection(options), _settings(options)):
        found.append(row)
        if options.save:
            results.save(found, path)
    print(show.table(found))
    if options.save:
        kept = results.read(path)
        show.draw(kept, path.with_suffix(".png"))
        path.with_suffix(".md").write_text(f"{show.table(kept)}\n")
        print(f"written to {path}, .md and .png")


def _selection(options: argparse.Namespace) -> Selection:
    gpu = torch.device(options.device).type == "cuda"
    small = ("bundled",) if options.quick else ("bundled", "flux-small")
    large = tuple(name for name in geometries() if name not in SMALL)
    providers = tuple(options.providers or (PROVIDERS if gpu else ON_CPU))
    return Selection(
        models=tuple(options.models or (large if gpu and not options.quick else small)),
        images=tuple(options.images or ((1, 8) if gpu else (1,))),
        schedules=tuple(options.schedules),
        providers=tuple(PROVIDERS) if "all" in providers else providers,
        flux_blocks=tuple(options.flux_blocks),
    )


def _settings(options: argparse.Namespace) -> Settings:
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    return Settings(
        steps=4 if options.quick else options.steps,
        repeats=options.repeats,
        device=device,
        dtype=DTYPES[options.dtype] if options.dtype else torch.bfloat16 if gpu else torch.float32,
        alone=gpu if options.alone is None else options.alone,
        floor=gpu if options.floor is None else options.floor,
    )


if __name__ == "__main__":
    main()
