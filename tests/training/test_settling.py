"""What a training settles on: the best it saw, and what exchanging steps makes of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from harmonica_training import train
from harmonica_training.settling import Settling
from harmonica_training.validation import Validation
from tests.training.small import config, dit

Mask = NDArray[np.bool_]


class Placed:
    """Stands for a model whose images are the better, the nearer the computed steps are to `wanted`."""

    def __init__(self, wanted: str) -> None:
        self._wanted = np.array([digit == "1" for digit in wanted])
        self.seen: list[str] = []

    def logs(self, computes: Mask) -> Iterator[float]:
        found, wanted = np.flatnonzero(computes[:, 0]), np.flatnonzero(self._wanted)
        for batch in range(3):
            self.seen.append("".join("01"[int(value)] for value in computes[:, 0]) + f"/{batch}")
            yield float(np.abs(found - wanted).sum())


def rows(text: str) -> Mask:
    return np.array([[digit == "1"] * 3 for digit in text])


def settling(validation: Any, steps: int, exchanges: int) -> Settling:
    return Settling(validation, np.arange(steps) > 0, exchanges)


def logits_of(mask: Mask) -> torch.Tensor:
    return torch.from_numpy(np.where(mask, 1.0, -1.0) + np.arange(len(mask))[:, None] / 100)


def test_exchanges_lead_to_the_best_place_of_each_step() -> None:
    validation = Placed("1001011010")
    settles = settling(validation, 10, 2)
    start = rows("1111100000")
    for iteration in range(1, 40):
        settles.follow(iteration, start, logits_of(start))
    best = settles.best
    assert best is not None
    assert best.logs == (0.0, 0.0, 0.0)
    np.testing.assert_array_equal(best.computes, rows("1001011010"))
    np.testing.assert_array_equal(best.logits.numpy() > 0, best.computes)  # the router moved with its schedule
    assert sorted(best.logits[:, 0].tolist()) == sorted(logits_of(start)[:, 0].tolist())
    last = len(validation.seen)
    settles.follow(50, best.computes, best.logits)
    assert len(validation.seen) == last  # nothing left to try, and the best is not measured twice


def test_the_nearest_steps_are_tried_first_and_as_many_as_asked() -> None:
    validation = Placed("11110000")
    settles = settling(validation, 8, 3)
    settles.follow(1, rows("11110000"), torch.zeros(8, 3))
    assert validation.seen == []  # not its turn
    settles.follow(2, rows("11110000"), torch.zeros(8, 3))
    assert validation.seen == ["11110000/0", "11110000/1", "11110000/2", "11101000/0", "11011000/0", "11100100/0"]
    settles.follow(3, rows("11110000"), torch.zeros(8, 3))
    assert len(validation.seen) == 9  # three more, and none of these hopeless ones for more than a batch
    assert len(set(validation.seen)) == 9


def test_settling_continues_from_a_checkpoint() -> None:
    start, wanted = rows("1110000"), "1010010"
    whole = settling(Placed(wanted), 7, 1)
    for iteration in range(1, 9):
        whole.follow(iteration, start, logits_of(start))
    first = settling(Placed(wanted), 7, 1)
    for iteration in range(1, 5):
        first.follow(iteration, start, logits_of(start))
    second = settling(Placed(wanted), 7, 1)
    second.load(first.tensors(), first.values())
    for iteration in range(5, 9):
        second.follow(iteration, start, logits_of(start))
    assert second.values() == whole.values()
    assert whole.best is not None
    assert second.best is not None
    np.testing.assert_array_equal(second.best.computes, whole.best.computes)
    assert torch.equal(second.best.logits, whole.best.logits)


@pytest.mark.parametrize("exchanges", [0, 2])
def test_a_training_settles_on_the_best_it_saw(monkeypatch: pytest.MonkeyPatch, exchanges: int) -> None:
    seen: dict[bytes, list[float]] = {}
    measure = Validation.logs

    def watched(self: Validation, computes: Mask) -> Iterator[float]:
        logs = seen[computes.tobytes()] = []
        for log in measure(self, computes):
            logs.append(log)
            yield log

    monkeypatch.setattr(Validation, "logs", watched)
    result = train(dit(layers=3), config(iterations=6, exchanges=exchanges, validation_batches=2))
    whole = {mask: math.exp(statistics.fmean(logs)) for mask, logs in seen.items() if len(logs) == 2}
    assert 1 < len(seen) <= 3 + 5 * exchanges  # the first schedule is measured after two iterations
    best = min(whole, key=whole.__getitem__)
    assert result.schedule.compute.tobytes() == best
    assert result.speedup == pytest.approx(1.4, rel=0.02)
    assert result.schedule.made_by is not None
    assert result.schedule.made_by.hyper_parameters["validated_error"] == whole[best]


@pytest.mark.parametrize("how", [{"gates": "soft"}, {"beta": 1e-4, "target_speedup": None}])
def test_soft_gates_and_a_fixed_beta_have_nothing_to_settle(how: dict[str, Any]) -> None:
    """Soft gates stand for no schedule, and under a fixed beta the best images are those of the dearest schedule."""
    schedule = train(dit(layers=2), config(iterations=2, **how)).schedule
    assert schedule.made_by is not None
    assert schedule.made_by.hyper_parameters["validated_error"] is None
