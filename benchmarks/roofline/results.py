"""Rows: one per case, schedule, lowering and kind of step, with the times on every GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows

PATH = rows.RESULTS / "roofline.json"
FULL, PARTIAL, PROLOGUE, UNFORESEEN, RUN = "full step", "partial step", "prologue", "timestep part of a step", "run"


@dataclass(frozen=True)
class Row:
    """A prediction. Nothing in it is measured.

    Attributes:
        case: model, geometry and images.
        schedule: name of the schedule; `none` for the uncached model.
        lowering: name of the lowering, or how the uncached model runs.
        step: what the row is about; figures of steps are means over the steps of the kind.
        work: `steps` of this kind in a run, `kernels`, bytes `read` and `written`, `flops`; for a step also the number
            of `copies` around its CUDA graph, which the times include.
        host: seconds of the host: `graphs`, with CUDA graphs, and `launches`, kernel by kernel.
        seconds: predicted seconds of the device, by GPU.
        floor: seconds that no step can go below, by GPU: its products without launches, and the other bytes that must
            move. Empty for what is no step.
        products: the same with each product as the library computes it, which is the floor that `latency` measures.
    """

    case: str
    schedule: str
    lowering: str
    step: str
    work: Mapping[str, float]
    host: Mapping[str, float]
    seconds: Mapping[str, float]
    floor: Mapping[str, float]
    products: Mapping[str, float]


def save(found: Iterable[Row], path: Path) -> None:
    """Write rows, which replace those of the same case, schedule, lowering and step in the file."""
    rows.merge(path, [_flat(row) for row in found], ("case", "schedule", "lowering", "step"))


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [Row(**{name: value for name, value in row.items() if name != "machine"}) for row in rows.read(path)]


def _flat(row: Row) -> dict[str, object]:
    fields = dataclasses.asdict(row)
    return {name: rows.rounded(value) if isinstance(value, dict) else value for name, value in fields.items()}
