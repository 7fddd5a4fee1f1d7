"""The figures in the first table of the README, and those of the forecasts, are those of the saved rows."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks import rows as saved_rows
from benchmarks.quality.forecasts import table
from tests.docs.markdown import REPO

CASES = {
    "bundled model, `every(2)`": ("bundled model, 1 image", "every(2)"),
    "bundled model, learned": ("bundled model, 1 image", "learned"),
    "small Flux, `every(2)`": ("small Flux (3 + 6 blocks, width 384), 256 tokens, 1 image", "every(2)"),
}

QUOTED = {("every(2)", "sublayer", method) for method in ("reuse", "Taylor", "fitted, 2 weights")} | {
    ("bundled", "sublayer", method) for method in ("reuse", "Taylor", "fitted, 4 weights")
}


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """The cells of a table row, from the saved rows of its case."""
    measured = {row["provider"]: row for row in rows if row.get("vs_eager") is not None}
    best = max((row for row in measured.values() if row["role"] == "peer"), key=lambda row: row["vs_eager"])
    fused, inductor = measured["harmonica-rt, fused"], measured["harmonica-rt, inductor"]
    values = [fused["theory"], fused["vs_eager"], inductor["vs_eager"], best["vs_eager"], best["theory"]]
    return [f"{value:.2f}x" for value in values]


def test_the_first_table_of_the_readme() -> None:
    readme = (REPO / "README.md").read_text("utf-8")
    saved = json.loads((REPO / "benchmarks" / "results" / "latency-cpu.json").read_text())["rows"]
    for name, (case, schedule) in CASES.items():
        (line,) = re.findall(rf"^\| {re.escape(name)} \| (.*)$", readme, re.MULTILINE)
        rows = [row for row in saved if (row["case"], row["schedule"]) == (case, schedule)]
        assert re.findall(r"[\d.]+x", line) == figures(rows)


def test_the_tables_of_forecasts() -> None:
    """Bootstrap intervals are drawn with one seed, so the table is the same each time."""
    rows = saved_rows.read(REPO / "benchmarks" / "results" / "forecasts-cpu.json")
    assert {row["seed"] for row in rows} == {0, 1, 2}
    overview = table.overview(table.lines(rows, {}))
    assert overview in (REPO / "docs" / "quality.md").read_text("utf-8")
    readme = " ".join((REPO / "README.md").read_text("utf-8").split())
    for line in table.lines(rows, {}):
        if (line.schedule, line.level, line.method) in QUOTED:
            assert f"{line.psnr.mean:.1f} dB" in readme, line
