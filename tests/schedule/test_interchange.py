"""Schedules of other tools: what they mean there is what they mean here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

SITES = [f"blocks.{block}.{part}" for block in range(2) for part in ("attn", "mlp")]
DIFFUSERS = [f"transformer_blocks.{block}.{part}" for block in range(2) for part in ("attn1", "ff")]
COMPONENTS = {"attn": "attn1", "mlp": "ff"}


def write(path: Path, lists: Any) -> Path:
    path.write_text(json.dumps(lists))
    return path


def test_a_list_for_all_blocks_and_one_for_a_single_block(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", {"attn": [1, 0, 0], "attn-1": [1, 0, 1], "mlp": [1, 1, 0]})
    schedule = Schedule.from_smoothcache(path, sites=SITES)
    assert schedule.compute.T.astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0]]
    renamed = Schedule.from_smoothcache(path, sites=DIFFUSERS, components=COMPONENTS)
    assert np.array_equal(renamed.compute, schedule.compute)
    assert schedule.made_by is not None
    assert schedule.made_by.method == "smoothcache"


def test_a_site_without_a_list_computes(tmp_path: Path) -> None:
    schedule = Schedule.from_smoothcache(write(tmp_path / "s.json", {"attn": [1, 0]}), sites=SITES)
    assert schedule.compute[1].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"attn": [1, 0], "mpl": [1, 0]}, r"\['mpl'\] decide no site"),
        ({"attn1": [1, 0]}, "components="),
        ({"attn": [1, 0], "mlp": [1, 0, 0]}, "one length"),
        ({"attn": [1, 2]}, "only 0 .* and 1"),
        ({"attn": 1}, "attn: expected a list"),
        ({"attn": []}, "got none"),
        ({}, "one length"),
        ([1, 0], "expected a JSON object"),
        ({"attn": [0, 1]}, "step 0 reuses"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path, lists: Any, message: str) -> None:
    path = write(tmp_path / "s.json", lists)
    with pytest.raises(ScheduleError, match=message) as error:
        Schedule.from_smoothcache(path, sites=SITES)
    assert str(error.value).startswith(str(path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Schedule.from_smoothcache(tmp_path / "none.json", sites=SITES)


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back(tmp_path: Path, seed: int) -> None:
    schedule = Schedule.random(0.4, steps=6, sites=DIFFUSERS, seed=seed)
    schedule.save_smoothcache(tmp_path / "s.json", components=COMPONENTS)
    back = Schedule.from_smoothcache(tmp_path / "s.json", sites=DIFFUSERS, components=COMPONENTS)
    assert np.array_equal(back.compute, schedule.compute)
    assert all(key.partition("-")[0] in COMPONENTS for key in json.loads((tmp_path / "s.json").read_text()))


def test_blocks_that_agree_share_a_list(tmp_path: Path) -> None:
    Schedule.from_mask({"attn": "10", "mlp": "11"}, sites=SITES).save_smoothcache(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == {"attn": [1, 0], "mlp": [1, 1]}


def test_two_sites_of_one_name_there(tmp_path: Path) -> None:
    sites = ["double.0.attn", "single.0.attn"]
    Schedule.every(2, steps=4, sites=sites).save_smoothcache(tmp_path / "s.json")
    differing = Schedule.from_mask({"double.*": "10", "single.*": "11"}, sites=sites)
    with pytest.raises(ScheduleError, match=r"single\.0\.attn.*'attn-0'"):
        differing.save_smoothcache(tmp_path / "s.json")


def test_weights_are_not_lost_on_the_way(tmp_path: Path) -> None:
    schedule = Schedule.every(2, steps=6, sites=DIFFUSERS).with_taylor()
    with pytest.raises(
        ScheduleError, match=r"has weights, and SmoothCache's files hold none; with_weights\(None\) drops"
    ):
        schedule.save_smoothcache(tmp_path / "s.json")
    with pytest.raises(ScheduleError, match="has weights, and a step mask holds none"):
        schedule.computed_steps()
    assert schedule.with_weights(None).step_mask() == [1, 0] * 3


def test_step_masks() -> None:
    schedule = Schedule.from_mask([1, 0, 1, 1], sites=SITES)
    assert schedule.step_mask() == [1, 0, 1, 1]
    mixed = Schedule.from_mask({"attn": "1011", "mlp": "1001"}, sites=SITES)
    with pytest.raises(ScheduleError, match=r"step 2 reuses 2 of 4 .* \(1 of 4 steps"):
        mixed.step_mask()
