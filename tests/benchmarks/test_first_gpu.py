"""The first run on a GPU: stages that fail, hang or come too late cost only themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import first_gpu
from benchmarks.first_gpu import STAGES, Stage

BUDGET = 480  # seconds for all stages


def stage(name: str, code: str, seconds: int = 60) -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code), seconds)


def outcomes(out: Path) -> dict[str, str]:
    return {each["stage"]: each["outcome"] for each in json.loads((out / "summary.json").read_text())}


def test_each_stage_ends_by_itself_and_the_rest_run(tmp_path: Path) -> None:
    stages = [
        stage("hangs", "import time; time.sleep(60)", seconds=1),
        stage("fails", "raise SystemExit(3)"),
        Stage("is missing", ("no-such-program",), 60),
        stage("works", "print('all is well')"),
    ]
    assert first_gpu.run(stages, tmp_path, BUDGET) == 1
    assert outcomes(tmp_path) == {"hangs": "timed out", "fails": "failed", "is missing": "failed", "works": "ok"}
    assert "== works\nall is well" in (tmp_path / "log.txt").read_text()
    assert first_gpu.run(stages[3:], tmp_path, BUDGET) == 0


def test_no_stage_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert first_gpu.run([stage("late", "print()")], tmp_path, seconds=first_gpu.LEAST - 1) == 1
    assert outcomes(tmp_path) == {"late": "no time left"}


def test_what_must_be_right_comes_before_what_is_timed() -> None:
    timed = [index for index, each in enumerate(STAGES) if any("benchmarks" in word for word in each.command)]
    checked = [index for index, each in enumerate(STAGES) if "tests/execute/test_families_gpu.py" in each.command]
    assert max(checked) < min(timed)
