"""`python -m benchmarks soak`: 10,000 random runs, or one world again with `--kind KIND --world SEED`."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import rows
from benchmarks.soak.drive import KINDS, Fault, Kind, Piece, Tally, added_up, faults_of, pieces
from benchmarks.soak.shrink import shrunk


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare random runs with an oracle made of forward hooks; exit with 1 if any run was wrong."""
    names = {kind.name: kind for kind in KINDS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="number of runs, over all kinds (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all worlds (default: 0)")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes; it does not change the runs (default: 1)"
    )
    parser.add_argument("--kind", choices=names, metavar="KIND", help="do all runs with this kind of world")
    parser.add_argument("--world", type=int, metavar="SEED", help="run one world again: the seed that a fault printed")
    parser.add_argument("--shrink", action="store_true", help="with --world: remove what the first fault does not need")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/soak.json")
    options = parser.parse_args(arguments)
    if options.world is not None and options.kind is None:
        parser.error("--world needs --kind, as the fault printed it")
    if min(options.runs, options.processes) < 1:
        parser.error("--runs and --processes must be at least 1")
    _prepare()
    if options.world is not None:
        sys.exit(_run_again(names[options.kind], options.world, shrink=options.shrink))
    started = time.perf_counter()
    kinds = KINDS if options.kind is None else [replace(names[options.kind], share=1.0)]
    work = pieces(options.runs, options.seed, kinds)
    with multiprocessing.get_context("spawn").Pool(options.processes, _prepare) as pool:
        tallies = added_up(zip(work, pool.imap(_run_and_print, work), strict=True))
    seconds = time.perf_counter() - started
    found = [row for name, tally in tallies.items() for row in tally.rows(name)]
    found.append(rows.Row("soak", "all", "random", "runs", sum(t.runs for t in tallies.values()), "count"))
    found.append(rows.Row("soak", "all", "random", "time", seconds, "s"))
    rows.show(found)
    if options.save:
        print(f"written to {rows.save('soak', found)}")
    sys.exit(int(any(tally.faults for tally in tallies.values())))


def _prepare() -> None:
    logging.getLogger("harmonica_rt").setLevel(logging.ERROR)  # it warns of what the soak provokes
    torch.set_num_threads(1)


def _run_and_print(piece: Piece) -> Tally:
    return piece.run(lambda fault: print(fault, flush=True))


def _run_again(kind: Kind, seed: int, *, shrink: bool) -> int:
    faults: list[Fault] = []
    for fault in faults_of(kind, seed, Tally()):
        faults.append(fault)
        print(fault, flush=True)
        if shrink:
            print(f"shrunk to {shrunk(fault)}")
            break
    return int(bool(faults))


if __name__ == "__main__":
    main()
