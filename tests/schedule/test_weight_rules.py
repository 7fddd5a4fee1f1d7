"""Weights by rule, against the released code of the methods or their equations written out on values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import Schedule, WeightsBy

STEPS = 16
MASKS = {
    "every-2": "1010101010101010",
    "every-3": "1001001001001001",
    "uneven": "1101000101100001",
    "late": "1000000001000010",
}
SITES = [f"blocks.{i}.ff" for i in range(len(MASKS))]


def mixed() -> Schedule:
    """One site per mask, so that sites are computed at different steps."""
    return Schedule.from_array(np.array([[bit == "1" for bit in bits] for bits in MASKS.values()]).T, SITES)


def applied(schedule: Schedule, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a run gives, `[steps, sites]`, for a site whose true value at a step is `values[step]`."""
    found = np.repeat(values[:, None], len(schedule.sites), axis=1)
    for step, site in np.argwhere(~schedule.compute):
        latest = values[:step][schedule.compute[:step, site]][::-1]
        weights = schedule.entry_weights[step, site]
        found[step, site] = sum(w * v for w, v in zip(weights, latest, strict=False))
    return found


def forecast(schedule: Schedule, values: NDArray[np.float64], one: Callable[..., float]) -> NDArray[np.float64]:
    """The same with a forecast `one(step, steps, values)`, from the computed steps and their values, oldest first."""
    found = np.repeat(values[:, None], len(schedule.sites), axis=1)
    for step, site in np.argwhere(~schedule.compute):
        known = [int(s) for s in np.flatnonzero(schedule.compute[:step, site])]
        found[step, site] = one(int(step), known, [float(values[s]) for s in known])
    return found


def random_values(seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=STEPS)


def differenced(known: Sequence[int], values: Sequence[float], order: int, since: int) -> list[float]:
    """The factors that TaylorSeer keeps, updated value by value as its code does."""
    factors: list[float] = []
    for place, (step, value) in enumerate(zip(known, values, strict=True)):
        new = [value]
        for i in range(order):
            if i >= len(factors) or step < since:
                break
            new.append((new[i] - factors[i]) / (step - known[place - 1]))
        factors = new
    return factors


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_is_that_of_diffusers(order: int) -> None:
    from diffusers.hooks.taylorseer_cache import TaylorSeerState

    values = random_values(order)
    found = applied(mixed().with_taylor(order), values)
    for site in range(len(SITES)):
        state = TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=order)
        for step in range(STEPS):
            state.current_step = step
            if mixed().compute[step, site]:
                state.update((torch.tensor([values[step]], dtype=torch.float64),))
            else:
                assert found[step, site] == pytest.approx(state.predict()[0].item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("since", [2, 5])
def test_taylor_after_a_warm_up(order: int, since: int) -> None:
    def one(step: int, known: list[int], values: list[float]) -> float:
        factors = differenced(known, values, order, since)
        return sum(f * (step - known[-1]) ** i / math.factorial(i) for i, f in enumerate(factors))

    values = random_values()
    expected = forecast(mixed(), values, one)
    assert applied(mixed().with_taylor(order, since=since), values) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def hermite(n: int, x: float) -> float:
    return 1.0 if n == 0 else 2 * x if n == 1 else 2 * x * hermite(n - 1, x) - 2 * (n - 1) * hermite(n - 2, x)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("contraction", [0.5, 0.8])
def test_hermite(order: int, contraction: float) -> None:
    def one(step: int, known: list[int], values: list[float]) -> float:
        factors = differenced(known, values, order, 0)
        x = contraction * (step - known[-1])
        return factors[0] + sum(
            contraction**k * hermite(k, x) / math.factorial(k) * factors[k] for k in range(1, len(factors))
        )

    values = random_values()
    expected = forecast(mixed(), values, one)
    found = applied(mixed().with_hermite(order, contraction=contraction), values)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("degree", "ridge", "blend", "count"), [(4, 0.1, 1.0, 4), (2, 0.01, 0.5, 3), (0, 1.0, 0.25, 4)]
)
def test_chebyshev(degree: int, ridge: float, blend: float, count: int) -> None:
    def basis(step: int) -> list[float]:
        return [math.cos(m * math.acos(2 * step / STEPS - 1)) for m in range(degree + 1)]

    def one(step: int, known: list[int], values: list[float]) -> float:
        window = known[-count:]
        # ridge regression as least squares with one row per coefficient more
        rows = np.vstack([[basis(s) for s in window], math.sqrt(ridge) * np.eye(degree + 1)])
        coefficients = np.linalg.lstsq(rows, np.array([*values[-count:], *[0.0] * (degree + 1)]), rcond=None)[0]
        line = values[-1]
        if len(window) > 1:
            line += (values[-1] - values[-2]) * (step - known[-1]) / (known[-1] - known[-2])
        return float(blend * np.dot(basis(step), coefficients) + (1 - blend) * line)

    values = random_values()
    expected = forecast(mixed(), values, one)
    found = applied(mixed().with_chebyshev(degree, ridge=ridge, blend=blend, values=count), values)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_ratios_restore_the_magnitude() -> None:
    values = np.abs(random_values()) + 0.5
    ratios = [1.0, *(values[1:] / values[:-1])]
    assert applied(mixed().with_ratios(ratios), values) == pytest.approx(
        mixed().compute * 0 + values[:, None], rel=1e-5
    )
    assert mixed().with_ratios(np.array(ratios)).most_weights == 1  # type: ignore[arg-type]
    assert mixed().with_ratios([1.0] * STEPS) == mixed()


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=2), st.sampled_from([1, 2, 3]))
def test_taylor_reproduces_straight_lines_at_any_spacing(line: list[float], order: int) -> None:
    values = line[0] + line[1] * np.arange(STEPS)
    found = applied(mixed().with_taylor(order), values)
    told = np.cumsum(mixed().compute, axis=0) >= 2
    assert found[told] == pytest.approx(np.repeat(values[:, None], len(SITES), axis=1)[told], abs=1e-4)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_taylor_has_the_highest_coefficient_at_even_spacing(degree: int) -> None:
    schedule = Schedule.every(5, steps=25, sites=["a"]).with_taylor(degree)
    found = applied(schedule, np.arange(25.0) ** degree)[20:, 0]
    assert np.diff(found, n=degree) == pytest.approx(math.factorial(degree), abs=0.05)
    exact = np.allclose(found, np.arange(20.0, 25.0) ** degree, atol=0.05)
    assert exact == (degree == 1)


def test_sites_extrapolate_from_their_own_steps() -> None:
    schedule = Schedule.from_array([[1, 1], [1, 0], [0, 1], [0, 0]], ["a", "b"]).with_taylor()
    assert schedule.entry_weights[3].tolist() == [[3, -2], [1.5, -0.5]]
    assert schedule.entry_weights[2].tolist() == [[2, -1], [0, 0]]
    assert schedule.entry_weights[1].tolist() == [[0, 0], [1, 0]]


def test_who_made_the_weights_is_recorded() -> None:
    schedule = Schedule.every(2, steps=6, sites=["a"])
    assert schedule.with_taylor(2).weights_by == WeightsBy("taylor", {"order": 2, "since": 0})
    assert schedule.with_ratios([1, 1, 1, 0.5, 1, 1]).weights_by == WeightsBy(
        "ratios", {"ratios": [1, 1, 1, 0.5, 1, 1]}
    )
    assert schedule.with_taylor().made_by == schedule.made_by
    assert Schedule.all_compute(steps=3, sites=["a"]).with_taylor().weights_by is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.with_taylor(0), r"order: expected a whole number of 1 \.\.\. 3, got 0"),
        (lambda s: s.with_taylor(4), r"order: expected a whole number of 1 \.\.\. 3, got 4"),
        (lambda s: s.with_taylor(True), "order: expected a whole number"),
        (lambda s: s.with_taylor(1, since=-1), "since: expected a whole number of 0 or more, got -1"),
        (lambda s: s.with_hermite(2, contraction=0), "contraction: expected a number above 0"),
        (lambda s: s.with_hermite(1.5), "order: expected a whole number"),
        (lambda s: s.with_chebyshev(-1), r"degree: expected a whole number of 0 \.\.\. 16, got -1"),
        (lambda s: s.with_chebyshev(ridge=0.0), "ridge: expected a number above 0"),
        (lambda s: s.with_chebyshev(blend=2), r"blend: expected 0 \.\.\. 1"),
        (lambda s: s.with_chebyshev(values=5), r"values: expected a whole number of 1 \.\.\. 4, got 5"),
        (lambda s: s.with_ratios([1, 1]), r"ratios: expected one per step \(16\), got 2"),
        (lambda s: s.with_ratios([1.0] * 15 + [0.0]), r"ratios\[15\]: expected a number above 0"),
        (lambda s: s.with_ratios("1" * 16), "ratios: expected a list"),
    ],
)
def test_what_is_refused(make: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make(mixed())
