"""The object: validation, figures, equality, copies, producers."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import MadeBy, ModelInfo, SamplerInfo, Schedule

SITES = ("blocks.0.attn1", "blocks.0.ff", "blocks.1.attn1", "blocks.1.ff", "head")
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=bool)


def full() -> Schedule:
    return Schedule.from_array(
        MASK,
        SITES,
        model=ModelInfo("DiT", "sha256:0123"),
        sampler=SamplerInfo("DDIMScheduler", {"betas": np.array([0.1, 0.2]), "nested": {"a": [1, None, "x"]}}),
        timesteps=[999, 500.5, 0],
        guidance=4,
        made_by=MadeBy("harmonica", {"beta": 7e-8}, threshold=0.1, scores=[None, [0.12345, -1, 2, 3, -1e-9], [5] * 5]),
    )


def test_mask_is_kept_as_read_only_bools() -> None:
    mask = MASK.astype(np.int64)
    schedule = Schedule.from_array(mask, SITES)
    mask[:] = 1
    assert schedule.compute.dtype == np.bool_
    assert np.array_equal(schedule.compute, MASK)
    with pytest.raises(ValueError, match="read-only"):
        schedule.compute[1, 1] = False
    with pytest.raises(ValueError, match="WRITEABLE"):
        schedule.compute.setflags(write=True)
    with pytest.raises(FrozenInstanceError):
        schedule.guidance = 2.0  # type: ignore[misc]


def test_figures() -> None:
    schedule = full()
    assert schedule.steps == 3
    assert schedule.cur == pytest.approx(3 / 15)
    assert schedule.cur_per_step() == pytest.approx([0, 3 / 5, 0])
    assert schedule.cur_per_kind() == pytest.approx({"attn1": 2 / 6, "ff": 1 / 6, "head": 0})
    assert list(schedule.cur_per_kind()) == ["attn1", "ff", "head"]
    assert schedule.patterns == 2
    assert repr(schedule) == "<Schedule 3 steps x 5 sites, CUR 20.00%, made by harmonica>"


def test_kind_of_a_site_is_its_last_name_that_is_no_number() -> None:
    schedule = Schedule.all_compute(steps=1, sites=["blocks.0", "blocks.1", "blocks.2.ff.net.2", "parts[0:2]", "7"])
    assert list(schedule.cur_per_kind()) == ["blocks", "net", "parts", "7"]


def test_provenance_is_normalised() -> None:
    schedule = full()
    assert schedule.timesteps == (999.0, 500.5, 0.0)
    assert schedule.made_by is not None
    assert schedule.made_by.scores == (None, (0.1235, -1.0, 2.0, 3.0, 0.0), (5.0,) * 5)
    assert schedule.sampler is not None
    assert schedule.sampler.config["betas"] == (0.1, 0.2)


def test_equality_compares_everything_and_agrees_with_hash() -> None:
    schedule = full()
    assert schedule == full()
    assert hash(schedule) == hash(full())
    flipped = MASK.copy()
    flipped[2, 0] = False
    others = [
        Schedule.from_array(flipped, SITES),
        Schedule.from_array(MASK, [*SITES[:-1], "tail"]),
        schedule.with_provenance(model=ModelInfo("DiT")),
        schedule.with_provenance(sampler=SamplerInfo("DDIMScheduler")),
        schedule.with_provenance(timesteps=[3, 2, 1]),
        schedule.with_provenance(guidance=1.5),
        schedule.with_provenance(made_by=MadeBy("harmonica")),
    ]
    assert all((schedule == other) is False for other in others)
    assert (schedule == "schedule") is False
    assert len({schedule, full(), *others}) == 8


def test_equal_bits_in_another_shape_are_another_schedule() -> None:
    assert Schedule.all_compute(steps=2, sites=["a", "b"]) != Schedule.all_compute(steps=4, sites=["a"])


def test_with_provenance_keeps_what_is_not_given() -> None:
    changed = full().with_provenance(guidance=0.0)
    assert changed.guidance == 0.0
    assert changed.with_provenance(guidance=4) == full()


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal_and_read_only(clone) -> None:
    other = clone(full())
    assert other == full()
    assert hash(other) == hash(full())
    with pytest.raises(ValueError, match="WRITEABLE"):
        other.compute.setflags(write=True)


BAD_MASKS = {
    "one-dimension": ([True], "compute: expected two dimensions [steps, sites], got shape (1,)"),
    "ragged": ([[1, 1], [1]], "compute: expected a rectangular array"),
    "no-steps": (np.ones((0, 5)), "compute: expected at least one step and one site, got shape (0, 5)"),
    "floats": (MASK.astype(float), "compute: expected bools or 0/1 integers, got dtype float64"),
    "strings": ([["1"] * 5], "compute: expected bools or 0/1 integers, got dtype <U1"),
    "a-two": ([[1, 1, 1, 1, 2]], "compute: expected only 0 (reuse) and 1 (compute), got 2"),
    "a-site-less": (MASK[:, :4], "compute: expected one column per site, got 4 columns for 5 sites"),
    "first-step": (
        ~MASK,
        "compute: step 0 reuses 5 of 5 sites ('blocks.0.attn1' first), but nothing is stored",
    ),
}


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_mask(mask, message) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        Schedule.from_array(mask, SITES)
    with pytest.raises(ScheduleError, match=re.escape(message)):
        Schedule(mask, SITES)


BAD_SITES = {
    "none": ([], "sites: expected at least one site, got none"),
    "one-string": ("blocks.0", "sites: expected a list of dotted module paths, got 'blocks.0'"),
    "no-list": (5, "sites: expected a list of dotted module paths, got 5"),
    "empty-name": (["a", ""], "sites[1]: expected a dotted module path such as 'blocks.0.attn1', got ''"),
    "empty-part": (["a..b"], "sites[0]: expected a dotted module path"),
    "space": (["a b"], "sites[0]: expected a dotted module path"),
    "number": (["a", 3], "sites[1]: expected a dotted module path"),
    "twice": (["b", "a", "b", "a"], "sites: each site may appear only once, got several times: a, b"),
}


@pytest.mark.parametrize(("sites", "message"), BAD_SITES.values(), ids=BAD_SITES)
def test_bad_sites(sites, message) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        Schedule.all_compute(steps=2, sites=sites)


BAD_PROVENANCE = {
    "timesteps-short": (lambda: {"timesteps": [1, 2]}, "timesteps: expected one per step (3), got 2"),
    "timesteps-nan": (
        lambda: {"timesteps": [1, 2, np.nan]},
        "timesteps[2]: expected a finite number, got nan",
    ),
    "timesteps-text": (lambda: {"timesteps": ["1", 2, 3]}, "timesteps[0]: expected a number, got '1'"),
    "guidance-inf": (lambda: {"guidance": float("inf")}, "guidance: expected a finite number, got inf"),
    "guidance-huge": (lambda: {"guidance": 10**400}, "guidance: expected a finite number, got inf"),
    "guidance-bool": (lambda: {"guidance": True}, "guidance: expected a number, got True"),
    "model-text": (lambda: {"model": "DiT"}, "model: expected a ModelInfo or None, got str"),
    "model-empty": (
        lambda: {"model": ModelInfo("")},
        "model.class_name: expected a non-empty string, got ''",
    ),
    "fingerprint": (
        lambda: {"model": ModelInfo("D", " ")},
        "model.config_fingerprint: expected a non-empty string",
    ),
    "config-list": (
        lambda: {"sampler": SamplerInfo("D", [1])},
        "sampler.config: expected a mapping of names",
    ),
    "config-key": (
        lambda: {"sampler": SamplerInfo("D", {1: 2})},
        "sampler.config: keys must be strings, got 1",
    ),
    "config-nan": (
        lambda: {"sampler": SamplerInfo("D", {"a": [np.nan]})},
        "sampler.config.a[0]: expected a finite",
    ),
    "config-digits": (
        lambda: {"sampler": SamplerInfo("D", {"a": 10**400})},
        "sampler.config.a: expected a number of at",
    ),
    "config-object": (
        lambda: {"sampler": SamplerInfo("D", {"a": {"b": object()}})},
        "sampler.config.a.b: a object cannot be written to JSON",
    ),
    "method": (lambda: {"made_by": MadeBy(None)}, "made_by.method: expected a non-empty string, got None"),
    "threshold": (
        lambda: {"made_by": MadeBy("m", threshold="x")},
        "made_by.threshold: expected a number, got 'x'",
    ),
    "scores-rows": (
        lambda: {"made_by": MadeBy("m", scores=[[0.0] * 5])},
        "made_by.scores: expected one row per step (3), got 1",
    ),
    "scores-ragged": (
        lambda: {"made_by": MadeBy("m", scores=[None, [0.0] * 4, None])},
        "made_by.scores, step 1: expected one per site (5), got 4",
    ),
    "scores-nan": (
        lambda: {"made_by": MadeBy("m", scores=[[np.nan]])},
        "made_by.scores, step 0: expected a finite",
    ),
    "scores-text": (
        lambda: {"made_by": MadeBy("m", scores=["12"])},
        "made_by.scores, step 0: expected a list",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD_PROVENANCE.values(), ids=BAD_PROVENANCE)
def test_bad_provenance(given, message) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        Schedule.from_array(MASK, SITES, **given())


def test_all_compute_reuses_nothing() -> None:
    schedule = Schedule.all_compute(steps=4, sites=SITES)
    assert schedule.compute.all()
    assert schedule.cur == 0.0
    assert schedule.patterns == 1


@pytest.mark.parametrize(("k", "rows"), [(1, "11111"), (2, "10101"), (3, "10010"), (5, "10000"), (9, "10000")])
def test_every_computes_each_kth_step(k: int, rows: str) -> None:
    schedule = Schedule.every(k, steps=5, sites=SITES)
    assert [row.all() for row in schedule.compute] == [c == "1" for c in rows]
    assert schedule.compute.any(axis=1).tolist() == schedule.compute.all(axis=1).tolist()
    assert schedule.made_by == MadeBy("every", {"k": k})


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_every_refuses_other_than_whole_numbers(bad) -> None:
    with pytest.raises(ScheduleError, match="k: expected a whole number of at least 1"):
        Schedule.every(bad, steps=5, sites=SITES)
    with pytest.raises(ScheduleError, match="steps: expected a whole number of at least 1"):
        Schedule.every(2, steps=bad, sites=SITES)


@pytest.mark.parametrize("mask", ["101", [1, 0, 1], [True, False, True], np.array([1, 0, 1])], ids=repr)
def test_step_mask_computes_or_reuses_whole_steps(mask) -> None:
    schedule = Schedule.from_mask(mask, sites=SITES)
    assert np.array_equal(schedule.compute, np.repeat([[True], [False], [True]], 5, axis=1))


def test_step_masks_by_pattern_first_match_decides() -> None:
    schedule = Schedule.from_mask({"attn*": "1010", "*.1.ff": "1001", "*": "1100"}, sites=SITES)
    columns = ["".join("01"[int(c)] for c in column) for column in schedule.compute.T]
    assert columns == ["1010", "1100", "1010", "1001", "1100"]


BAD_STEP_MASKS = {
    "letter": ("1x", "mask: expected only 0 (reuse) and 1 (compute), got 'x' at step 1"),
    "two": ([1, 2], "mask: expected only 0 (reuse) and 1 (compute), got 2 at step 1"),
    "empty": ("", "mask: expected one entry per step, got none"),
    "first-reuses": ("01", "compute: step 0 reuses 5 of 5 sites"),
    "no-pattern": ({}, "mask: expected at least one pattern"),
    "pattern-letter": ({"*": "1-"}, "mask['*']: expected only 0 (reuse) and 1 (compute), got '-' at step 1"),
    "unequal": (
        {"attn1": "10", "*": "100"},
        "must be equally long, one entry per step; got lengths {'attn1': 2, '*': 3}",
    ),
    "unmatched-site": ({"attn1": "10", "ff": "11"}, "no pattern matches the site 'head' (kind 'head')"),
    "unmatched-pattern": ({"atn1": "10", "*": "11"}, "the patterns ['atn1'] decide no site"),
    "hidden-pattern": ({"*": "10", "ff": "11"}, "the patterns ['ff'] decide no site"),
}


@pytest.mark.parametrize(("mask", "message"), BAD_STEP_MASKS.values(), ids=BAD_STEP_MASKS)
def test_bad_step_mask(mask, message) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        Schedule.from_mask(mask, sites=SITES)


@given(cur=st.floats(0, 1), steps=st.integers(1, 9), n=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_random_reuses_exactly_what_was_asked(cur: float, steps: int, n: int, seed: int) -> None:
    sites = [f"blocks.{i}.ff" for i in range(n)]
    if cur > (steps - 1) / steps:
        with pytest.raises(ScheduleError, match="cur: expected 0"):
            Schedule.random(cur, steps=steps, sites=sites, seed=seed)
        return
    schedule = Schedule.random(cur, steps=steps, sites=sites, seed=seed)
    assert (~schedule.compute).sum() == round(cur * steps * n)
    assert schedule == Schedule.random(cur, steps=steps, sites=sites, seed=seed)


def test_random_differs_by_seed_and_refuses_bad_ones() -> None:
    one, two = (Schedule.random(0.4, steps=20, sites=SITES, seed=seed) for seed in (1, 2))
    assert not np.array_equal(one.compute, two.compute)
    with pytest.raises(ScheduleError, match="seed: expected a whole number of at least 0, got -1"):
        Schedule.random(0.4, steps=20, sites=SITES, seed=-1)
    with pytest.raises(ScheduleError, match=r"cur: expected 0 \.\.\. 0\.95"):
        Schedule.random(-0.1, steps=20, sites=SITES, seed=1)


def test_known_schedule_is_the_released_one() -> None:
    assert "dit-xl-2-256-ddim20-l2c" in Schedule.known_names()
    schedule = Schedule.known("dit-xl-2-256-ddim20-l2c")
    assert schedule.compute.shape == (20, 56)
    assert (~schedule.compute).sum() == 248
    assert f"{schedule.cur:.2%}" == "22.14%"
    assert schedule.patterns == 7
    assert schedule.compute[::2].all()  # Learning-to-Cache computes all at every other step
    assert schedule.made_by is not None
    assert schedule.made_by.method == "learning-to-cache"


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(FileNotFoundError, match=r"the package has no schedule '\.\./x'; it has \['dit-xl"):
        Schedule.known("../x")


@pytest.mark.parametrize("field", ["model", "sampler", "made_by"])
@pytest.mark.parametrize("value", ["", 0, "DiT"], ids=["empty", "zero", "name"])
def test_provenance_of_another_kind_is_refused_even_where_it_is_empty(field: str, value: object) -> None:
    schedule = Schedule.every(2, steps=4, sites=["blocks.0.attn"])
    with pytest.raises(ScheduleError, match=f"{field}: expected a"):
        schedule.with_provenance(**{field: value})  # type: ignore[arg-type]


def test_timesteps_that_are_no_list_are_refused() -> None:
    schedule = Schedule.every(2, steps=4, sites=["blocks.0.attn"])
    with pytest.raises(ScheduleError, match="timesteps: expected a list, got int"):
        schedule.with_provenance(timesteps=4)  # type: ignore[arg-type]


def test_the_patterns_of_a_mask_are_text() -> None:
    with pytest.raises(ScheduleError, match="mask: expected patterns of sites as keys, got 3"):
        Schedule.from_mask({3: "10"}, sites=["blocks.0.attn"])  # type: ignore[dict-item]
