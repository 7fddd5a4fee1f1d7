"""Rows: measured figures with all that is needed to judge them, printed as tables and kept in `results/`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Spread
from harmonica_rt.schedule.files import write_atomically

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        benchmark: module that measured it.
        case: model, geometry and batch.
        schedule: name of the schedule.
        metric: what was measured.
        value: the figure; the median if it was measured more than once.
        unit: `s`, `ratio`, `bytes`, `count` or `dB`.
        p20: 20th percentile over the repeats; None if it was measured once.
        p80: 80th percentile over the repeats; None if it was measured once.
        repeats: how often it was measured.
        target: what the project asks of this figure; None if nothing.
    """

    benchmark: str
    case: str
    schedule: str
    metric: str
    value: float
    unit: str
    p20: float | None = None
    p80: float | None = None
    repeats: int = 1
    target: str | None = None


def spread_row(
    benchmark: str, case: str, schedule: str, metric: str, samples: list[float], unit: str, target: str | None = None
) -> Row:
    """The row of a figure that was measured `len(samples)` times: their median and spread."""
    spread = Spread.of(samples)
    low, high = (spread.p20, spread.p80) if len(samples) > 1 else (None, None)
    return Row(benchmark, case, schedule, metric, spread.p50, unit, low, high, len(samples), target)


def machine() -> dict[str, object]:
    """Device, cores, threads, versions and commit."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "triton", "cache-dit") if _is_installed(name)},
        **({"cuda": torch.version.cuda} if torch.cuda.is_initialized() else {}),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def save(name: str, rows: Iterable[Row]) -> Path:
    """Write rows to `results/NAME.json`, where they replace all rows of the same cases; returns the path."""
    path = RESULTS / f"{name}.json"
    merge(path, [short(dataclasses.asdict(row)) for row in rows], ("case",))
    return path


def merge(path: Path, new: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Add rows to a file, one per line so that two runs can be diffed.

    The file lists machines; each row has the index of the one that it was measured on.

    Args:
        path: the file.
        new: rows that were measured now, on this machine.
        key: names of fields; rows of the file whose values in all of them equal those of a new row are removed.
    """
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"machines": [], "rows": []}
    replaced = {tuple(row[name] for name in key) for row in new}
    old = [row for row in kept["rows"] if tuple(row[name] for name in key) not in replaced]
    machines = [kept["machines"][row["machine"]] for row in old] + [machine()] * len(new)
    listed = [one for index, one in enumerate(machines) if one not in machines[:index]]
    rows = [{**row, "machine": listed.index(one)} for row, one in zip([*old, *new], machines, strict=True)]
    parts = (",\n    ".join(map(json.dumps, part)) for part in (listed, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, '{{\n  "machines": [\n    {}\n  ],\n  "rows": [\n    {}\n  ]\n}}\n'.format(*parts))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with the index of its machine; empty if there is no file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def show(rows: Iterable[Row]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "schedule", "metric", "value", "p20 - p80", "unit", "target")
    for row in rows:
        spread = f"{row.p20:.4g} - {row.p80:.4g}" if row.p20 is not None and row.p80 is not None else ""
        table.add_row(row.case, row.schedule, row.metric, f"{row.value:.4g}", spread, row.unit, row.target or "")
    Console(width=150).print(table)


def short(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None, rounded as by `rounded`."""
    return rounded({name: value for name, value in fields.items() if value is not None})


def rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with floats rounded to six significant digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()}


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
