"""Time to the same quality: what is compared with what."""

from __future__ import annotations

import pytest

pytest.importorskip("torchmetrics", reason="the quality benchmark needs it")

from benchmarks.quality.producers import FULL
from benchmarks.time_to_quality import Trained, part, time_ratio


def test_the_shortest_that_is_as_good_as_their_best() -> None:
    theirs = [Trained(1.0, 30.0), Trained(2.0, 36.0), Trained(4.0, 35.0)]  # more training was not better
    ours = [Trained(0.5, 35.9), Trained(1.0, 36.0), Trained(2.0, 40.0)]
    assert time_ratio(ours, theirs) == 0.5
    assert time_ratio(theirs, ours) is None


def test_a_share_of_a_budget() -> None:
    half = part(FULL, 0.5)
    assert (half.iterations, half.settling, half.batch) == (FULL.iterations // 2, FULL.settling // 2, FULL.batch)
    least = part(FULL, 1e-6)
    assert (least.iterations, least.settling) == (1, 2)
