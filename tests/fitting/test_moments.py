"""Least squares from moments: known weights come back, also where the history is nearly collinear or short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harmonica_rt.fitting import moments
from harmonica_rt.fitting.moments import fitted_weights, moments_of, no_moments, squared_error


def history(count: int, *, change: float, size: int = 1000) -> list[torch.Tensor]:
    """Values whose differences are `change` times their size, newest first."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator)
    return [start + change * torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("weights", [[0.9], [1.5, -0.5], [2.2, -1.7, 0.5], [3.0, -3.0, 1.5, -0.5]], ids=len)
@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-4])
def test_weights_that_made_the_truth_come_back(weights: list[float], change: float) -> None:
    values = [value.double() for value in history(len(weights), change=change)]
    truth = sum(weight * value for weight, value in zip(weights, values, strict=True))
    found = fitted_weights(moments_of(truth, values))
    assert found == pytest.approx(weights, abs=1e-4)
    assert (
        squared_error(moments_of(truth, values), found)
        < 1e-10 * squared_error(moments_of(truth, values), np.eye(1, len(weights))[0]) + 1e-20
    )


def test_the_squared_error_is_that_of_the_forecast() -> None:
    values = history(3, change=0.01)
    truth = history(4, change=0.01)[3]
    weights = np.array([1.2, -0.3, 0.05])
    forecast = sum(weight * value.double() for weight, value in zip(weights, values, strict=True))
    assert squared_error(moments_of(truth, values), weights) == pytest.approx(
        float(((truth.double() - forecast) ** 2).sum()), rel=1e-9
    )


def test_no_other_weights_leave_a_smaller_error() -> None:
    values = history(2, change=0.01)
    found = moments_of(history(3, change=0.01)[2], values)
    best = fitted_weights(found)
    for change in ([0.01, 0.0], [-0.01, 0.0], [0.0, 0.01], [0.0, -0.01], [0.01, -0.01]):
        assert squared_error(found, best + np.array(change)) > squared_error(found, best)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_values_give_plain_reuse_of_the_first(count: int) -> None:
    [value] = history(1, change=0.0)
    weights = fitted_weights(moments_of(value, [value] * count))
    assert weights == pytest.approx(np.eye(1, count)[0], abs=1e-9)


def test_values_of_zero_give_plain_reuse() -> None:
    zero = torch.zeros(10)
    assert fitted_weights(moments_of(zero, [zero, zero])).tolist() == [1.0, 0.0]


def test_moments_add_up_over_tensors_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, [*_, truth] = history(2, change=0.1), history(3, change=0.1)
    whole = moments_of(truth, values)
    parts = [moments_of(truth[part], [value[part] for value in values]) for part in (slice(400), slice(400, None))]
    assert np.allclose(whole, parts[0] + parts[1], rtol=1e-12)
    monkeypatch.setattr(moments, "_CHUNK", 7)
    assert np.allclose(moments_of(truth, values), whole, rtol=1e-12)
    tree = moments_of((truth[:400], {"rest": truth[400:]}), [(v[:400], {"rest": v[400:]}) for v in values])
    assert np.allclose(tree, whole, rtol=1e-12)


def test_what_is_no_float_tensor_counts_as_nothing() -> None:
    assert np.array_equal(moments_of((torch.arange(3), None, 2), [(torch.arange(3), None, 2)]), no_moments(1))


def test_half_precision_is_widened_before_differences_are_taken() -> None:
    values = [value.to(torch.bfloat16) for value in history(2, change=0.1)]
    truth = (1.5 * values[0].double() - 0.5 * values[1].double()).float()
    assert fitted_weights(moments_of(truth, values)) == pytest.approx([1.5, -0.5], abs=1e-4)
