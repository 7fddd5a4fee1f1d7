"""`python -m benchmarks fuzz [--seconds N] [--format NAME] [--seed S] [--file N] [--found DIR] [--save]`."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.fuzz.format import Format
from benchmarks.fuzz.formats import FORMATS
from benchmarks.fuzz.run import Outcome, run


def main(arguments: Sequence[str]) -> None:
    """Give damaged and forged files to every reader, which must read each or refuse it with a documented error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds for all formats together (default: 60)")
    parser.add_argument(
        "--format", action="append", choices=sorted(FORMATS), help="format to fuzz; may be repeated (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--file", type=int, metavar="N", help="read only file N, to reproduce a finding")
    parser.add_argument(
        "--found", type=Path, default=Path("fuzz-found"), help="folder for the files of findings (default: fuzz-found)"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fuzz.json")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # readers log what they ignore
    chosen = [FORMATS[name] for name in options.format or FORMATS]
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for format in chosen:
            numbers = itertools.count() if options.file is None else [options.file]
            until = time.monotonic() + options.seconds / len(chosen)
            outcome = run(format, numbers, options.seed, Path(folder), until)
            outcomes[format.name] = outcome
            _keep(format, outcome, options.seed, options.found)
    measured = [row for name, outcome in outcomes.items() for row in _rows(name, outcome, options.seed)]
    rows.show(measured)
    if options.save:
        print(f"written to {rows.save('fuzz', measured)}")
    sys.exit(any(outcome.findings for outcome in outcomes.values()))


def _keep(format: Format, outcome: Outcome, seed: int, folder: Path) -> None:
    """Print the findings of a format and save their files."""
    for finding in outcome.findings:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{format.name}-{seed}-{finding.number}-{format.file}"
        path.write_bytes(finding.data)
        print(f"--- {path}, reproduced by --format {format.name} --seed {seed} --file {finding.number}\n{finding.why}")


def _rows(name: str, outcome: Outcome, seed: int) -> list[rows.Row]:
    def row(metric: str, value: float, unit: str, target: str | None = None) -> rows.Row:
        return rows.Row("fuzz", name, f"seed {seed}", metric, value, unit, target=target)

    return [
        row("files", outcome.files, "count"),
        row("read", outcome.accepted, "count"),
        row("refused as documented", outcome.refused, "count"),
        row("undocumented errors", len(outcome.findings), "count", "0"),
        row("slowest file", outcome.slowest, "s"),
        row("memory grown", outcome.grown, "bytes"),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
