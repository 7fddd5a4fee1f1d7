"""The measuring itself: rows, spreads, interleaving, and the figures that need no clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import host_path, models, rows, schedules, site_levels, slot_memory
from benchmarks.rows import Row
from benchmarks.timing import Spread, interleaved
from tests.models import attending, stack, stack_call


def test_rows_are_one_line_each_and_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    path = rows.save("some", [Row("some", "case", "every(2)", "ratio", 1.23456789, "ratio", target="at least 1")])
    kept = json.loads(path.read_text())
    assert kept["rows"] == [
        {
            "benchmark": "some",
            "case": "case",
            "schedule": "every(2)",
            "metric": "ratio",
            "value": 1.23457,
            "unit": "ratio",
            "repeats": 1,
            "target": "at least 1",
            "machine": 0,
        }
    ]
    assert kept["machines"][0]["torch"] == torch.__version__


def test_rows_of_other_cases_stay_with_their_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)

    def save(device: str, *found: tuple[str, str, float]) -> None:
        monkeypatch.setattr(rows, "machine", lambda: {"device": device})
        rows.save("some", [Row("some", case, "every(2)", metric, value, "s") for case, metric, value in found])

    save("old", ("a", "run", 1.0), ("a", "step", 2.0), ("b", "run", 3.0))
    save("new", ("a", "run", 4.0))
    kept = json.loads((tmp_path / "some.json").read_text())
    found = [(kept["machines"][row["machine"]]["device"], row["case"], row["value"]) for row in kept["rows"]]
    assert found == [("old", "b", 3.0), ("new", "a", 4.0)]
    save("new", ("b", "run", 5.0))
    assert json.loads((tmp_path / "some.json").read_text())["machines"] == [{"device": "new"}]


def test_rounds_are_interleaved_after_a_warm_up() -> None:
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert [len(samples) for samples in seconds.values()] == [2, 2]


def test_spread_is_median_and_percentiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 1.8, pytest.approx(23.2))


PEAKS_AROUND_AN_ALLOCATION = """
import sys, time
from benchmarks.memory import PeakMemory
size = int(sys.argv[1])
with PeakMemory() as before:
    pass
with PeakMemory() as during:
    allocated = b"1" * size
    for _ in range(1000):
        if during.peak > size:
            break
        time.sleep(0.01)
    del allocated
print(before.peak, during.peak)
"""


def test_peak_memory_sees_an_allocation() -> None:
    """In a process of its own: here, the memory of other tests comes and goes."""
    size = 256 * 2**20
    printed = subprocess.check_output(
        [sys.executable, "-c", PEAKS_AROUND_AN_ALLOCATION, str(size)], cwd=Path(__file__).parents[2], text=True
    )
    before, during = map(int, printed.split())
    assert during - before > 0.9 * size


def test_ten_patterns_are_ten() -> None:
    assert schedules.ten_patterns([f"site.{i}" for i in range(56)], 20).patterns == 10


def test_slot_memory_of_a_small_model() -> None:
    measured = slot_memory._rows("small", stack(), stack_call(0), 6, "1")
    ratios = [row.value for row in measured if row.metric == "planned / lower bound"]
    assert len(ratios) == 6
    assert set(ratios) == {1.0}


def test_site_levels_of_a_small_model() -> None:
    case = models.Case("small", attending(), [stack_call(step, width=16) for step in range(4)])
    found = site_levels.case_rows(case, 1)
    ratios = {row.schedule: row.value for row in found if row.metric == "run / sublayer, plain"}
    assert len(ratios) == 8
    assert ratios["sublayer, plain"] == 1.0
    assert all(ratio > 0 for ratio in ratios.values())


def test_host_path_has_both_figures() -> None:
    found = host_path.run(repeats=1, quick=True)
    metrics = [row.metric.removeprefix("host, per step: ") for row in found]
    assert metrics[:3] == ["compiled model", "copies and replay alone", "check for changes of the model alone"]
    assert all(row.value > 0 for row in found)
