"""Weights of a schedule: their simplest form, what is refused, equality and copies."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import Schedule, WeightsBy

SITES = ("blocks.0.attn", "blocks.0.ff")
MASK = [[1, 1], [0, 0], [1, 1], [0, 1], [0, 0]]
SHARED = [[7.0, 7.0], [0.5, 0.0], [7.0, 7.0], [1.5, -0.5], [2.0, -1.0]]


def plain() -> Schedule:
    return Schedule.from_array(MASK, SITES)


def test_weights_shared_by_the_sites_of_a_step() -> None:
    schedule = plain().with_weights(SHARED)
    assert schedule.weights is not None
    assert schedule.weights.tolist() == [[0, 0], [0.5, 0], [0, 0], [1.5, -0.5], [2, -1]]
    assert schedule.entry_weights[3].tolist() == [[1.5, -0.5], [0, 0]]
    assert schedule.most_weights == 2
    assert "up to 2 weights" in repr(schedule)


def test_equal_weights_of_all_sites_are_kept_once() -> None:
    each = np.repeat(np.array(SHARED)[:, None], 2, axis=1)
    assert plain().with_weights(each) == plain().with_weights(SHARED)
    each[4, 1, 0] = 3.0
    different = plain().with_weights(each)
    assert different.weights is not None
    assert different.weights.shape == (5, 2, 2)
    assert different.weights[3].tolist() == [[1.5, -0.5], [0, 0]]  # none where the entry is computed


def test_plain_reuse_in_any_form_is_no_weights() -> None:
    for weights in (np.ones((5, 1)), np.ones((5, 2, 1)), np.eye(4)[[0] * 5], None):
        assert plain().with_weights(weights) == plain()
    assert plain().with_weights(np.ones((5, 1)), by=WeightsBy("x")).weights_by is None
    assert plain().entry_weights[..., 0].tolist() == [[0, 0], [1, 1], [0, 0], [1, 0], [1, 1]]


def test_unused_places_are_dropped() -> None:
    padded = np.pad(np.array(SHARED), ((0, 0), (0, 2)))
    assert plain().with_weights(padded) == plain().with_weights(SHARED)


def test_weights_are_rounded_to_float32_and_have_one_zero() -> None:
    schedule = plain().with_weights([[0], [0.1], [0], [0.3], [1]])
    assert schedule.weights is not None
    assert schedule.weights[1, 0] == np.float64(np.float32(0.1))
    negative, positive = ([[0, 0], [1, 0], [0, 0], [zero, 1], [1, 1]] for zero in (-0.0, 0.0))
    assert plain().with_weights(negative) == plain().with_weights(positive)
    assert hash(plain().with_weights(negative)) == hash(plain().with_weights(positive))


def test_weights_are_read_only_and_survive_copies() -> None:
    schedule = plain().with_weights(SHARED, by=WeightsBy("mine", {"a": [1]}))
    assert schedule.weights is not None
    with pytest.raises(ValueError, match="read-only"):
        schedule.weights[1] = 0.0
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert again.weights_by == WeightsBy("mine", {"a": (1,)})


def test_provenance_leaves_weights_alone() -> None:
    schedule = plain().with_weights(SHARED, by=WeightsBy("mine"))
    made = schedule.with_provenance(guidance=2)
    assert made.weights_by == WeightsBy("mine")
    assert made.with_weights(None) == plain().with_provenance(guidance=2)
    assert np.array_equal(made.entry_weights, schedule.entry_weights)


def test_equality_tells_weights_and_their_maker_apart() -> None:
    schedule = plain().with_weights(SHARED)
    assert schedule != plain()
    assert schedule != plain().with_weights(SHARED, by=WeightsBy("mine"))
    assert schedule != plain().with_weights([[1], [0.5], [1], [1], [1]])


BAD = {
    "shape": (np.ones((4, 1)), "weights: expected shape [5, order] or [5, 2, order], got [4, 1]"),
    "sites": (np.ones((5, 3, 1)), "got [5, 3, 1]"),
    "ragged": ([[1], [1, 2], [1], [1], [1]], "weights: expected a rectangular array"),
    "many": (np.ones((5, 5)), "weights: expected 1 to 4 per entry, got 5"),
    "none": (np.ones((5, 0)), "weights: expected 1 to 4 per entry, got 0"),
    "bools": (np.ones((5, 1), dtype=bool), "weights: expected numbers, got dtype bool"),
    "nan": ([[1], [1], [1], [np.nan], [1]], "weights, step 3: expected finite numbers that float32 can hold, got nan"),
    "large": (
        [[1], [1e39], [1], [1], [1]],
        "weights, step 1: expected finite numbers that float32 can hold, got 1e+39",
    ),
    "zero": ([[1], [1], [1], [0], [1]], "weights, step 3: those of 'blocks.0.attn', [0.0], are all 0 in float32"),
    "early": (
        [[1, 0], [1, 1], [1, 0], [1, 0], [1, 0]],
        "weights, step 1: those of 'blocks.0.attn', [1.0, 1.0], use more values than were computed before it (1)",
    ),
}


@pytest.mark.parametrize(("weights", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(weights: object, message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        plain().with_weights(weights)  # type: ignore[arg-type]


def test_history_counts_the_steps_that_computed_the_site_itself() -> None:
    weights = np.zeros((5, 2, 3))
    weights[[1, 1, 3, 4, 4], [0, 1, 0, 0, 1], 0] = 1.0
    weights[4, 1, 2] = 0.5  # computed at steps 0, 2 and 3
    assert plain().with_weights(weights).most_weights == 3
    weights[4, 0, 2] = 0.5  # computed at steps 0 and 2
    with pytest.raises(ScheduleError, match=r"step 4: those of 'blocks\.0\.attn'.*\(2\)"):
        plain().with_weights(weights)


def test_a_maker_without_weights_is_refused() -> None:
    with pytest.raises(ScheduleError, match="weights_by: says who made the weights, but there are none"):
        plain().with_weights(None, by=WeightsBy("mine"))
    with pytest.raises(ScheduleError, match="weights_by: expected a WeightsBy or None, got str"):
        plain().with_weights(SHARED, by="mine")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=r"weights_by\.method: expected a non-empty string"):
        WeightsBy("")
