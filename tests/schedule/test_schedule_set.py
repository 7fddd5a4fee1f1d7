"""Schedules for several numbers of steps: which one is taken, what may be together, and the file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import MadeBy, ModelInfo, Schedule, ScheduleSet
from harmonica_rt.schedule.format import ScheduleFileNotFoundError
from harmonica_rt.schedule.provenance import _DEEPEST
from harmonica_rt.schedule.schedule_set import is_set

SITES = ["blocks.0.attn", "blocks.0.ff"]


def every(steps: int, k: int = 2, **fields: Any) -> Schedule:
    return replace(Schedule.every(k, steps=steps, sites=SITES), **fields)


def of(*steps: int) -> ScheduleSet:
    return ScheduleSet(map(every, steps))


def test_schedules_are_in_the_order_of_their_steps() -> None:
    made = ScheduleSet([every(20), every(8).with_taylor(), every(50, 3)])
    assert made.steps == (8, 20, 50)
    assert made.sites == tuple(SITES)
    assert made == ScheduleSet(reversed(made.schedules))
    assert hash(made) == hash(ScheduleSet(reversed(made.schedules)))
    assert made != of(8, 20, 50)
    assert pickle.loads(pickle.dumps(made)) == made
    assert ScheduleSet.of(made) is made
    assert ScheduleSet.of(every(8)).schedules == (every(8),)
    assert repr(made) == "<ScheduleSet of 2 sites, steps 8 (CUR 50.00%), 20 (CUR 50.00%), 50 (CUR 66.00%)>"


@pytest.mark.parametrize(
    ("steps", "nearest"),
    [
        *((1, 8), (8, 8), (12, 8), (13, 20), (20, 20), (31, 20), (32, 50), (50, 50), (1000, 50)),
    ],
)
def test_the_nearest_by_ratio(steps: int, nearest: int) -> None:
    assert of(8, 20, 50).nearest(steps).steps == nearest


def test_of_two_equally_near_the_one_with_more_steps() -> None:
    assert of(7, 28).nearest(14).steps == 28
    assert of(10, 40).nearest(20).steps == 40
    assert of(3, 12).nearest(6).steps == 12


@given(st.sets(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 80))
def test_the_nearest_is_at_no_greater_ratio_than_any_other(steps: set[int], asked: int) -> None:
    found = of(*steps).nearest(asked).steps

    def ratio(other: int) -> float:
        return max(other, asked) / min(other, asked)

    assert all(ratio(found) <= ratio(other) * (1 + 1e-12) for other in steps)
    if asked in steps:
        assert found == asked


def test_an_exact_one_is_taken_as_it_is() -> None:
    made = ScheduleSet([every(8), every(20, 3)])
    assert made.resample(20) is made.schedules[1]
    assert made.resample(30) == every(20, 3).resample(30)
    assert made.resample(9) == every(8).resample(9)
    made_by = made.resample(30).made_by
    assert made_by == MadeBy("every", {"k": 3, "resampled_from": 20})


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "8"])
def test_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(ScheduleError, match="steps: expected a whole number of at least 1"):
        of(8).resample(steps)


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ([], "a set holds at least one schedule"),
        ([every(8), every(8, 3)], "two are for 8 steps"),
        ([every(8), Schedule.every(2, steps=9, sites=SITES[:1])], "those for 8 and 9 steps have other sites"),
        ([every(8), Schedule.every(2, steps=9, sites=SITES[::-1])], "those for 8 and 9 steps have other sites"),
        ([every(8), "every-2.json"], r"schedules\[1\]: expected a Schedule, got str"),
        (
            [every(8, model=ModelInfo("A")), every(9), every(10, model=ModelInfo("B"))],
            r"made for several models or configs \(A, B\)",
        ),
        ([every(8, model=ModelInfo("A", "sha256:1")), every(9, model=ModelInfo("A", "sha256:2"))], "several models"),
    ],
    ids=["none", "same steps", "other sites", "other order", "no schedule", "other models", "other configs"],
)
def test_what_may_not_be_together(schedules: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        ScheduleSet(schedules)


def test_a_saved_set_is_loaded_and_saved_as_the_same_bytes(tmp_path: Path) -> None:
    made = ScheduleSet([every(6).with_taylor(), every(4, model=ModelInfo("A", "sha256:1")), every(9)])
    made.save(tmp_path / "set.json")
    again = ScheduleSet.load(tmp_path / "set.json")
    assert again == made
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "set.json").read_bytes()
    document = json.loads((tmp_path / "set.json").read_text())
    assert [schedule["steps"] for schedule in document["schedules"]] == [4, 6, 9]
    every(9).save(tmp_path / "one.json")
    assert document["schedules"][2] == json.loads((tmp_path / "one.json").read_text())
    assert is_set(tmp_path / "set.json")
    assert not is_set(tmp_path / "one.json")
    assert not is_set(tmp_path / "none.json")


def test_the_most_deeply_nested_schedule_fits_into_a_set(tmp_path: Path) -> None:
    def nested(depth: int) -> Schedule:
        value: Any = 1
        for _ in range(depth):
            value = [value]
        return every(4, made_by=MadeBy("by hand", {"deep": value}))

    depth = _DEEPEST  # of what hyper-parameters may hold
    with pytest.raises(ScheduleError, match="nested too deep"):
        nested(depth + 1)
    ScheduleSet([nested(depth)]).save(tmp_path / "set.json")
    assert ScheduleSet.load(tmp_path / "set.json").schedules == (nested(depth),)


def test_a_folder_of_schedule_files_is_a_set(tmp_path: Path) -> None:
    for steps in (20, 8):
        every(steps).save(tmp_path / f"{steps}-steps.json")
    (tmp_path / "README.md").write_text("not a schedule")
    assert ScheduleSet.load(tmp_path) == of(8, 20)
    every(8, 3).save(tmp_path / "other.json")
    with pytest.raises(ScheduleError, match=f"{tmp_path}: schedules: two are for 8 steps"):
        ScheduleSet.load(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ScheduleError, match=r"other\.json: format: expected 'harmonica-schedule', got None"):
        ScheduleSet.load(tmp_path)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ScheduleFileNotFoundError, match="no such schedule file"):
        ScheduleSet.load(tmp_path / "none.json")
    with pytest.raises(ScheduleFileNotFoundError, match=r"no schedule file \(\*\.json\) in this folder"):
        ScheduleSet.load(tmp_path)


def _without(field: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(field)


def _with(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(version=2), "version: this harmonica-rt reads version 1 of sets, got 2"),
        (_with(version=True), "version: this harmonica-rt reads version 1 of sets, got True"),
        (_with(format="harmonica"), "format: expected 'harmonica-schedule-set', got 'harmonica'; this is no set"),
        (_with(format="harmonica-schedule"), "Schedule.load reads a single one"),
        (_with(shedules=[]), "shedules: unknown field; did you mean 'schedules'"),
        (_without("schedules"), "schedules: missing field"),
        (_with(schedules=None), "schedules: null"),
        (_with(schedules={}), "schedules: expected a list, got dict"),
        (_with(schedules=[]), "schedules: a set holds at least one schedule"),
        (_with(schedules=[3]), r"schedules\[0\]: expected an object, got a number"),
        (lambda document: document["schedules"][1].pop("compute"), r"schedules\[1\]: compute: missing field"),
        (lambda document: document["schedules"][1].update(version=9), r"schedules\[1\]: version: this harmonica-rt"),
        (lambda document: document["schedules"].append(document["schedules"][0]), "two are for 4 steps"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    path = tmp_path / "set.json"
    of(4, 6).save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ScheduleError, match=f"set.json: .*{message}"):
        ScheduleSet.load(path)


def test_a_file_that_is_no_json_or_repeats_a_key(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text("[]")
    with pytest.raises(ScheduleError, match=r"set\.json: not a file of schedules"):
        ScheduleSet.load(path)
    of(4).save(path)
    path.write_text(path.read_text().replace('"version": 1,', '"version": 1, "version": 1,', 1))
    with pytest.raises(ScheduleError, match="version: the field occurs more than once"):
        ScheduleSet.load(path)


def test_a_set_is_no_schedule(tmp_path: Path) -> None:
    of(4, 6).save(tmp_path / "set.json")
    with pytest.raises(ScheduleError, match=r"got 'harmonica-schedule-set'; ScheduleSet\.load reads sets"):
        Schedule.load(tmp_path / "set.json")
