"""Schedules for another number of steps: the same rows at the same rate, valid weights, what the provenance says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import MadeBy, Schedule, WeightsBy
from harmonica_rt.schedule.weights import computed_before, reach

SITES = ["blocks.0.attn", "blocks.0.ff", "blocks.1.attn", "blocks.1.ff"]


def rows(mask: NDArray[np.bool_]) -> set[bytes]:
    return {row.tobytes() for row in mask}


@st.composite
def schedules(draw: st.DrawFn, weighted: bool = True) -> Schedule:
    steps, cur = draw(st.integers(1, 24)), draw(st.floats(0.0, 0.9))
    sites = SITES[: draw(st.integers(1, 4))]
    schedule = Schedule.random(min(cur, (steps - 1) / steps), steps=steps, sites=sites, seed=draw(st.integers(0, 99)))
    if not weighted:
        return schedule
    kind = draw(st.sampled_from(["plain", "taylor", "hermite", "chebyshev", "ratios", "by hand"]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    match kind:
        case "taylor":
            return schedule.with_taylor(draw(st.integers(1, 3)), since=draw(st.integers(0, 3)))
        case "hermite":
            return schedule.with_hermite(draw(st.integers(1, 3)))
        case "chebyshev":
            return schedule.with_chebyshev(draw(st.integers(0, 4)))
        case "ratios":
            return schedule.with_ratios(random.uniform(0.5, 2.0, steps).tolist())
        case "by hand":
            weights = random.normal(size=(steps, len(sites), 4))
            weights[np.arange(4) >= computed_before(schedule.compute)[..., None]] = 0.0
            return schedule.with_weights(weights)
    return schedule


@given(schedules(), st.integers(1, 60))
def test_rows_weights_and_histories_stay_valid(schedule: Schedule, steps: int) -> None:
    made = schedule.resample(steps)
    assert made.compute.shape == (steps, len(schedule.sites))
    assert rows(made.compute) <= rows(schedule.compute)
    assert made.compute[0].all()
    assert made.sites == schedule.sites
    if schedule.weights_by is None:  # a rule may use a history that has become longer
        assert made.most_weights <= schedule.most_weights
    used = reach(made.entry_weights)
    assert (used[~made.compute] >= 1).all()
    assert (used <= computed_before(made.compute)).all()


@given(schedules())
def test_as_many_steps_change_nothing(schedule: Schedule) -> None:
    assert schedule.resample(schedule.steps) is schedule
    longer = schedule.resample(2 * schedule.steps)
    assert longer.resample(longer.steps) == longer


@given(schedules(weighted=False), st.integers(1, 60))
def test_the_rows_of_as_many_steps_are_those_in_their_order(schedule: Schedule, seed: int) -> None:
    from harmonica_rt.schedule.resampling import resampled_rows

    taken = schedule.compute[resampled_rows(schedule.compute, schedule.steps)]
    assert np.array_equal(taken, schedule.compute)


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 80))
def test_whole_steps_are_computed_at_the_same_rate(bits: list[bool], steps: int) -> None:
    schedule = Schedule.from_mask([1, *map(int, bits)], sites=["a", "b"])
    made = schedule.resample(steps)
    computed = schedule.compute[:, 0].sum() * steps / schedule.steps
    if len(rows(schedule.compute)) == 2:
        assert abs(made.compute[:, 0].sum() - computed) <= 1
    else:
        assert made.compute.all()


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("steps", [8, 20, 30, 60])
def test_a_period_stays_the_same_period(k: int, steps: int) -> None:
    schedule = Schedule.every(k, steps=4 * k, sites=SITES)
    made = schedule.resample(steps)
    assert np.array_equal(made.compute, Schedule.every(k, steps=steps, sites=SITES).compute)


def test_a_quarter_of_the_run_keeps_its_share() -> None:
    bits = "1" * 6 + "100" * 4 + "10" * 6
    made = Schedule.from_mask(bits, sites=["a"]).resample(50)
    assert "".join("01"[int(bit)] for bit in made.compute[:, 0]) == "1" * 10 + "100" * 7 + "10" * 9 + "1"


def test_weights_of_a_rule_are_made_again() -> None:
    base = Schedule.random(0.5, steps=12, sites=SITES, seed=3)
    for schedule in (base.with_taylor(2, since=1), base.with_hermite(3), base.with_chebyshev(3, blend=0.5)):
        made = schedule.resample(19)
        assert made.weights_by == schedule.weights_by
        by = schedule.weights_by
        assert by is not None
        again = getattr(base.resample(19), f"with_{by.method}")(**by.hyper_parameters)
        assert made == again


def test_ratios_are_those_of_the_steps_in_between() -> None:
    magnitudes = np.exp(-np.arange(10) / 7)
    schedule = Schedule.every(2, steps=10, sites=["a"]).with_ratios([1.0, *(magnitudes[1:] / magnitudes[:-1])])
    made = schedule.resample(20)
    assert made.weights is not None
    # half a step of the original: the root of its ratio, as long as there is a later step to interpolate to
    assert made.weights[1:19:2, 0] == pytest.approx(np.exp(-1 / 14), rel=1e-5)


def test_weights_that_a_person_changed_are_not_made_by_the_rule() -> None:
    schedule = Schedule.every(2, steps=8, sites=["a"]).with_taylor()
    weights = schedule.entry_weights.copy()
    weights[5, 0] = [1.4, -0.4]
    edited = schedule.with_weights(weights, by=schedule.weights_by)
    made = edited.resample(16)
    assert made.weights_by == WeightsBy("taylor", {"order": 1, "since": 0, "resampled_from": 8})
    assert made.entry_weights[11, 0, 0] == pytest.approx(1.4, abs=0.03)  # at the same share of the run


def test_other_weights_keep_their_parts_of_a_taylor_series() -> None:
    """0.9 of the latest value and 0.6 of the first-order term, at other distances."""

    def made(steps: int, k: int) -> Schedule:
        schedule = Schedule.every(k, steps=steps, sites=["a"])
        weights = np.zeros((steps, 2))
        for step in range(1, steps):
            x = (step % k) / k
            weights[step] = [0.9 + 0.6 * x, -0.6 * x] if step > k else [0.9, 0.0]
        return schedule.with_weights(weights)

    for k in (2, 3):
        again = made(6 * k, k).resample(30)
        assert again.weights is not None
        assert again.entry_weights == pytest.approx(made(30, k).entry_weights, abs=1e-6)
        assert again.weights_by == WeightsBy("unknown", {"resampled_from": 6 * k})


def test_gains_are_interpolated_over_the_run() -> None:
    weights = np.linspace(1.0, 0.5, 9)[:, None]
    made = Schedule.every(2, steps=9, sites=["a"]).with_weights(weights).resample(27)
    own = made.entry_weights[~made.compute[:, 0], 0, 0]
    assert np.all(np.diff(own) <= 1e-9)
    assert own[0] == pytest.approx(weights[1, 0])
    assert own[-1] == pytest.approx(weights[7, 0])


def test_a_history_that_is_too_short_has_fewer_weights() -> None:
    schedule = Schedule.from_mask("110000", sites=["a"]).with_weights([[1, 0], [1, 0], *[[2.0, -1.0]] * 4])
    made = schedule.resample(3)
    assert made.compute[:, 0].tolist() == [True, False, False]
    assert made.weights is None  # what is left of them is the latest value
    gone = Schedule.from_mask("110000", sites=["a"]).with_weights([[1, 0], [1, 0], *[[1.0, -1.0]] * 4])
    assert gone.resample(3).weights is None  # nothing is left of them


def test_the_provenance_says_so() -> None:
    base = Schedule.every(2, steps=10, sites=["a"]).with_provenance(timesteps=range(10), guidance=3)
    made = base.resample(7)
    assert made.made_by == MadeBy("every", {"k": 2, "resampled_from": 10})
    assert made.timesteps is None
    assert made.guidance == 3
    assert made.resample(5).made_by == MadeBy("every", {"k": 2, "resampled_from": 10})
    assert Schedule.from_array([[1], [0]], ["a"]).resample(3).made_by == MadeBy("resampled", {"resampled_from": 2})


def test_scores_follow_their_rows() -> None:
    scores = [None, [-1.0], [1.0], [-2.0]]
    base = Schedule.from_array([[1], [0], [1], [0]], ["a"], made_by=MadeBy("harmonica", threshold=0.5, scores=scores))
    made = base.resample(9)
    assert made.made_by is not None
    assert made.made_by.scores is not None
    assert [row is None or row[0] > 0 for row in made.made_by.scores] == made.compute[:, 0].tolist()


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "8"])
def test_no_number_of_steps(steps: object) -> None:
    with pytest.raises(ScheduleError, match="steps: expected a whole number of at least 1"):
        Schedule.every(2, steps=4, sites=["a"]).resample(steps)  # type: ignore[arg-type]
