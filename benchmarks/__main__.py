"""`python -m benchmarks [NAME ...] [--repeats N] [--only TEXT] [--quick] [--save]`."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterable

from benchmarks import rows

BENCHMARKS = (
    "kernels",
    "speedup",
    "end_to_end",
    "site_levels",
    "latency",
    "host_path",
    "host_run",
    "compile_cost",
    "slot_memory",
    "zoo",
    "training_cost",
    "time_to_quality",
)
OWN_COMMANDS = ("latency", "roofline", "quality", "fuzz", "soak")  # with their own options; the last three take long


def main() -> None:
    """Run the named benchmarks (default: all) and print their rows; with --save, keep the rows in results/."""
    if sys.argv[1:] and sys.argv[1] in OWN_COMMANDS and not set(sys.argv[2:]) & set(BENCHMARKS):
        importlib.import_module(f"benchmarks.{sys.argv[1]}.__main__").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=main.__doc__,
        epilog=f"{', '.join(OWN_COMMANDS)} have their own options: python -m benchmarks NAME --help",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved rounds per timing (default: 7)")
    parser.add_argument("--quick", action="store_true", help="a trial: smaller models and fewer steps")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only the cases of end_to_end or zoo whose names contain TEXT"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    names = options.names or list(BENCHMARKS)
    if options.only and names not in (["end_to_end"], ["site_levels"], ["zoo"]):
        parser.error("--only needs exactly one benchmark: end_to_end, site_levels or zoo")
    shared = [argument for argument in sys.argv[1:] if argument not in BENCHMARKS]
    if len(names) > 1:
        sys.exit(_each(([name] for name in names), shared))
    [name] = names
    if name in OWN_COMMANDS:
        importlib.import_module(f"benchmarks.{name}.__main__").main(shared)
        return
    benchmark = importlib.import_module(f"benchmarks.{name}")
    if hasattr(benchmark, "cases") and not options.only:
        sys.exit(_each(([name, "--only", case] for case in benchmark.cases(quick=options.quick)), shared))
    only = {"only": options.only} if options.only else {}
    measured = benchmark.run(repeats=options.repeats, quick=options.quick, **only)
    rows.show(measured)
    if options.save:
        print(f"written to {rows.save(name, measured)}")


def _each(runs: Iterable[list[str]], shared: list[str]) -> int:
    """Run each in its own process, so that none measures another's memory or caches; 1 if any failed, else 0."""
    codes = [subprocess.call([sys.executable, "-m", "benchmarks", *run, *shared]) for run in runs]
    return int(any(codes))


if __name__ == "__main__":
    main()
