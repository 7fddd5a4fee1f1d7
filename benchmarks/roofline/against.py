"""`python -m benchmarks.roofline.against [FILE]`: saved predictions beside what `latency` measured on a GPU.

A prediction is for one GPU. Rows of another GPU are compared with the prediction for the one named by `--gpu`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import rows
from benchmarks.roofline import results
from benchmarks.roofline.gpus import gpus

STEPS = {results.FULL: "full_step", results.PARTIAL: "partial_step"}  # kind of step -> field of a latency row
PROVIDERS = {  # provider -> lowering
    "eager": "eager",
    "torch.compile, reduce-overhead": "torch.compile",
    **{f"harmonica-rt, {name}": name for name in ("plain", "fused", "inductor")},
}


class Comparison(NamedTuple):
    """One step, predicted and measured in seconds."""

    case: str
    schedule: str
    lowering: str
    step: str
    predicted: float
    measured: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Print predicted and measured times of steps, and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline.against", description=main.__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=rows.RESULTS / "latency-cuda.json")
    parser.add_argument("--gpu", choices=tuple(gpus()), default="H100 SXM", help="predictions to take")
    options = parser.parse_args(arguments)
    if not options.file.exists():
        parser.error(f"{options.file} does not exist: run python -m benchmarks latency --save on a GPU first")
    measured = json.loads(options.file.read_text())["rows"]
    print(f"predicted for {options.gpu}\n{'predicted':>10} {'measured':>10} {'ratio':>6}")
    for each in compared(measured, results.read(results.PATH), options.gpu):
        ratio = each.measured / each.predicted
        times = f"{each.predicted * 1e3:8.3f}ms {each.measured * 1e3:8.3f}ms {ratio:6.2f}"
        print(f"{times}  {each.case}, {each.schedule}, {each.lowering}, {each.step}")


def compared(measured: Sequence[dict[str, Any]], predicted: Sequence[results.Row], gpu: str) -> Iterator[Comparison]:
    """Each measured step for which there is a prediction.

    Args:
        measured: rows of `latency`.
        predicted: rows of `roofline`.
        gpu: the GPU to take predictions of.
    """
    known = {(row.case, row.schedule, row.lowering, row.step): row.seconds[gpu] for row in predicted if row.seconds}
    for row in measured:
        lowering = PROVIDERS.get(row["provider"], "")
        for step, field in STEPS.items():
            for schedule in (row["schedule"], "none"):
                seconds = known.get((row["case"], schedule, lowering, step))
                if seconds is not None and row.get(field):
                    yield Comparison(row["case"], row["schedule"], lowering, step, seconds, row[field])


if __name__ == "__main__":
    main()
