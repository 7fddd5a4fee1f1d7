"""Settings of cache-dit: files as it reads them, what they mean, and what no static schedule can express."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

SITES = [f"transformer_blocks.{block}.{part}" for block in range(4) for part in ("attn1", "ff")]
FILE = """\
cache_config:
  max_warmup_steps: 8
  max_cached_steps: -1
  Fn_compute_blocks: 1
  Bn_compute_blocks: 1
  num_inference_steps: 6
  steps_computation_mask: [1, 1, 0, 1, 0, 0]
  steps_computation_policy: static  # the default decides at run time
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 2
parallelism_config:
  ulysses_size: auto
"""


def load(tmp_path: Path, text: str) -> Schedule:
    (tmp_path / "cache.yaml").write_text(text)
    return Schedule.from_cache_dit(tmp_path / "cache.yaml", sites=SITES)


def test_a_file_with_a_step_mask_and_taylorseer(tmp_path: Path) -> None:
    schedule = load(tmp_path, FILE)
    reused = [[0, 0, 1, 1, 1, 1, 0, 0] if bit == "0" else [0] * 8 for bit in "110100"]
    assert (~schedule.compute).astype(int).tolist() == reused
    assert schedule == Schedule.from_array(schedule.compute, SITES, made_by=schedule.made_by).with_taylor(2, since=2)
    # its TaylorSeer subtracts nothing from the values of steps 0 and 1, so step 2 has one value to go by
    assert schedule.entry_weights[2, 2].tolist() == [1, 0]
    assert schedule.entry_weights[4, 2].tolist() == [1.5, -0.5]


def test_a_mapping_means_the_same_as_a_file(tmp_path: Path) -> None:
    options = yaml.safe_load(FILE)
    for given in (options, options["cache_config"]):
        assert Schedule.from_cache_dit(given, sites=SITES) == load(tmp_path, FILE)


def test_defaults_are_those_of_cache_dit() -> None:
    mask = {"steps_computation_mask": [1, 0], "steps_computation_policy": "static"}
    assert Schedule.from_cache_dit(mask, sites=SITES).compute.all()  # its first 8 blocks compute at every step
    plain = Schedule.from_cache_dit({**mask, "Fn_compute_blocks": 1}, sites=SITES)
    assert plain.weights is None
    assert plain.compute[1].tolist() == [True] * 2 + [False] * 6


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_there_and_back(tmp_path: Path, order: int) -> None:
    text = FILE.replace("taylorseer_order: 2", f"taylorseer_order: {order or 1}")
    schedule = load(tmp_path, text if order else text.replace("seer: true", "seer: false"))
    schedule.save_cache_dit(tmp_path / "again.yaml")
    again = Schedule.from_cache_dit(tmp_path / "again.yaml", sites=SITES)
    assert np.array_equal(again.compute, schedule.compute)
    assert np.array_equal(again.entry_weights, schedule.entry_weights)
    written = yaml.safe_load((tmp_path / "again.yaml").read_text())["cache_config"]
    assert written["steps_computation_mask"] == [1, 1, 0, 1, 0, 0]
    assert (written["Fn_compute_blocks"], written["Bn_compute_blocks"]) == (1, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("policy: static", "policy: dynamic", "steps_computation_policy: 'dynamic' decides from values while"),
        ("  steps_computation_policy: static", "", "steps_computation_policy: 'dynamic' decides"),
        ("[1, 1, 0, 1, 0, 0]", "fast", "steps_computation_mask: expected a list of 0 and 1, got the name 'fast'"),
        ("  steps_computation_mask: [1, 1, 0, 1, 0, 0]", "", "steps_computation_mask: expected a list of 0 and 1"),
        ("[1, 1, 0, 1, 0, 0]", "[1, 0]", "steps_computation_mask: expected one entry per step (6), got 2"),
        ("[1, 1, 0, 1, 0, 0]", "[0, 1, 0, 1, 0, 0]", "compute: step 0 reuses 4 of 8 sites"),
        ("order: 2", "order: 4", "taylorseer_order: expected 1 ... 3, which 4 weights can express, got 4"),
        ("seer: true", "seer: 1", "enable_taylorseer: expected true or false, got 1"),
        ("enable_taylorseer", "enable_dmd", "enable_dmd: is not linear in the latest values"),
        ("max_cached_steps: -1", "max_cache_steps: 1", "max_cache_steps: no option of cache-dit that is known"),
        ("Fn_compute_blocks: 1", "Fn_compute_blocks: -1", "Fn_compute_blocks: expected a whole number of at least 0"),
        ("  Fn_compute_blocks: 1", "  Fn_compute_blocks: 1\n  Fn_compute_blocks: 2", "the field occurs more"),
        ("[1, 1, 0, 1, 0, 0]", "&a [1, 1, 0, 1, 0, 0]\n  cache_type: *a", "it has aliases"),
        ("[1, 1, 0, 1, 0, 0]", "{1: 0}", "steps_computation_mask: expected a plain value or a list of plain values"),
        ("cache_config:\n", "cache_config: [1]\nx:\n", "cache_config: expected a mapping of names to values"),
        ("8\n", "2001-99-99\n", "max_warmup_steps: month must be in 1..12"),
        ("cache_config:", "cache_config: [", "not a file of options of cache-dit: while parsing"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        load(tmp_path, FILE.replace(old, new, 1))
    assert str(caught.value).startswith(str(tmp_path / "cache.yaml"))


@pytest.mark.parametrize(
    "text", ["[" * 16_000, "- " * 8000, "x" * 20_000, "\xff"], ids=["flow", "block", "long", "bytes"]
)
def test_files_that_would_take_a_minute_to_parse_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cache.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ScheduleError, match="not a file of options of cache-dit"):
        Schedule.from_cache_dit(tmp_path / "cache.yaml", sites=SITES)


def test_blocks_in_several_lists_have_no_first_one() -> None:
    settings = {"steps_computation_mask": [1, 0], "steps_computation_policy": "static", "Fn_compute_blocks": 1}
    with pytest.raises(ScheduleError, match=r"\['double', 'single'\], and which blocks are the first depends"):
        Schedule.from_cache_dit(settings, sites=["double.0.attn", "single.0.attn"])


def test_what_cache_dit_cannot_do_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    with pytest.raises(ScheduleError, match="computes at least the first block at every step"):
        Schedule.every(2, steps=4, sites=SITES).save_cache_dit(path)
    with pytest.raises(ScheduleError, match="no others, the same at every step; step 1 or a later one does not"):
        Schedule.from_mask({"attn1": "1111", "ff": "1010"}, sites=SITES).save_cache_dit(path)
    mask = {f"transformer_blocks.{block}.*": "1" * 6 if block in (0, 3) else "110100" for block in range(4)}
    schedule = Schedule.from_mask(mask, sites=SITES)
    for other in (schedule.with_taylor(1), schedule.with_hermite(1)):
        with pytest.raises(ScheduleError, match=r"not those of with_taylor\(order, since=2\)"):
            other.save_cache_dit(path)
    assert not path.exists()
    Schedule.all_compute(steps=3, sites=SITES).save_cache_dit(path)
    assert Schedule.from_cache_dit(path, sites=SITES).compute.all()


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Schedule.from_cache_dit(tmp_path / "none.yaml", sites=SITES)
