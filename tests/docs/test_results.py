"""The figures in the first table of the README are those of the saved rows."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.docs.markdown import REPO

CASES = {
    "bundled model, `every(2)`": ("bundled model, 1 image", "every(2)"),
    "bundled model, learned": ("bundled model, 1 image", "learned"),
    "small Flux, `every(2)`": ("small Flux (3 + 6 blocks, width 384), 256 tokens, 1 image", "every(2)"),
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
