"""Landing on a target, and steering towards it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmonica_training.config import TrainConfig
from harmonica_training.errors import TrainingError
from harmonica_training.target import TOLERANCE, Steering, Target

STEPS, SITES = 12, 10
ALONE = np.linspace(0.02, 0.14, SITES)
FREE = np.arange(STEPS) > 0


def additive_costs() -> Any:
    """Sites whose costs add up, to 80 % of the model."""

    def speedup(mask: Any) -> float:
        return float(1 / (1 - (~mask * ALONE).sum() / len(mask)))

    return SimpleNamespace(sites=tuple("abcdefghij"), alone=ALONE, speedup=speedup)


def target(**options: Any) -> Target:
    return Target(TrainConfig(steps=STEPS, **options), additive_costs(), FREE)


@given(
    seed=st.integers(0, 2**32 - 1),
    wanted=st.one_of(
        st.floats(1.1, 3.0).map(lambda value: {"target_speedup": value}),
        st.floats(0.05, 0.9).map(lambda value: {"target_cur": value}),
    ),
    levels=st.sampled_from([3, 10, 1000]),  # few: most scores are equal
)
def test_lands_on_every_target(seed: int, wanted: dict[str, float], levels: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, (STEPS, SITES)) / levels
    prices = random.random((STEPS, SITES))
    aim = target(**wanted)
    mask, threshold = aim.land(scores, prices, 0.1)
    (value,) = wanted.values()
    assert mask[0].all()
    assert abs(aim.reached(mask) / value - 1) <= max(TOLERANCE, 1 / mask.size / value)  # an entry is what there is
    assert (mask[1:][scores[1:] > threshold]).all()
    assert not mask[1:][scores[1:] < threshold].any()


def test_equal_scores_go_by_their_price() -> None:
    scores, prices = np.zeros((STEPS, SITES)), np.random.default_rng(0).random((STEPS, SITES))
    mask, _ = target(target_cur=0.5).land(scores, prices, 0.1)
    assert prices[1:][mask[1:]].min() >= prices[1:][~mask[1:]].max()


def test_the_threshold_is_tau_where_that_will_do() -> None:
    scores = np.random.default_rng(0).random((STEPS, SITES))
    scores[0] = 1.0
    at_tau = scores > 0.4
    mask, threshold = target(target_cur=1 - at_tau.mean()).land(scores, scores, 0.4)
    assert threshold == 0.4
    assert np.array_equal(mask, at_tau)
    mask, threshold = target(beta=1.0).land(scores, scores, 0.4)
    assert threshold == 0.4
    assert np.array_equal(mask, at_tau)


def test_targets_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"target_speedup: 5 cannot be reached.*it is 3.75"):
        target(target_speedup=5.0)
    with pytest.raises(TrainingError, match=r"target_cur: 0.95 cannot be reached.*it is 0.9167"):
        target(target_cur=0.95)


@pytest.mark.parametrize("wanted", [{"target_speedup": 1.3}, {"target_speedup": 2.2}, {"target_cur": 0.5}])
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_steering_brings_quadratic_errors_to_the_target(wanted: dict[str, float], scale: float) -> None:
    """On errors `a (1 - r)^2` beta ends where `r > tau` saves the goal's share, whatever their scale."""
    config = TrainConfig(steps=STEPS, learning_rate=0.05, gates="soft", **wanted)
    aim = Target(config, additive_costs(), FREE)
    steering = Steering(aim, config, (STEPS, SITES))
    sizes = torch.rand(STEPS, SITES, generator=torch.Generator().manual_seed(0)).exp() * scale
    logits = torch.zeros(STEPS, SITES, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        scores = logits.detach().sigmoid()
        by_score = -2 * sizes * (1 - scores)
        steering.observe(by_score, FREE, FREE, np.ones((STEPS, SITES), bool))
        logits.grad = (by_score + steering.penalty()) * scores * (1 - scores)
        optimizer.step()
        with torch.no_grad():
            logits.clamp_(-5, 5)
        steering.follow(logits.detach(), 0.05, FREE)
    mask = (logits.detach().sigmoid() > config.tau).numpy() | ~FREE[:, None]
    (value,) = wanted.values()
    assert aim.reached(mask) == pytest.approx(value, rel=0.1)


def test_a_given_beta_stays() -> None:
    config = TrainConfig(steps=STEPS, beta=0.25)
    steering = Steering(Target(config, additive_costs(), FREE), config, (STEPS, SITES))
    steering.observe(-torch.rand(STEPS, SITES), FREE, FREE, np.ones((STEPS, SITES), bool))
    steering.follow(torch.zeros(STEPS, SITES), 0.1, FREE)
    assert steering.beta == 0.25
    torch.testing.assert_close(steering.penalty().double(), 0.25 * torch.from_numpy(ALONE / ALONE.mean()))


def test_with_hard_gates_the_price_is_the_median_of_what_is_reused() -> None:
    config = TrainConfig(steps=STEPS, target_cur=0.5)
    steering = Steering(Target(config, additive_costs(), FREE), config, (STEPS, SITES))
    by_score = -torch.rand(STEPS, SITES, generator=torch.Generator().manual_seed(0))
    computes = np.random.default_rng(0).random((STEPS, SITES)) < 0.5
    steering.observe(by_score, FREE, FREE, computes)
    reused = torch.from_numpy(~computes & FREE[:, None])
    assert steering.beta == float((-by_score)[reused].median())
    assert not steering.prices[~reused].any()  # what computes has no error, so nobody knows its price
