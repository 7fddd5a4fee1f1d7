"""Predictions beside measurements: the same case, schedule, lowering and step."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.roofline import against, results
from benchmarks.roofline.gpus import gpus

SECONDS = dict.fromkeys(gpus(), 2e-3)


def predicted(lowering: str, step: str, schedule: str = "every(2)") -> results.Row:
    return results.Row("DiT", schedule, lowering, step, {}, {}, SECONDS, {}, {})


def test_steps_are_compared_with_their_own_prediction() -> None:
    measured = [
        {"case": "DiT", "schedule": "every(2)", "provider": "harmonica-rt, fused", "full_step": 3e-3},
        {"case": "DiT", "schedule": "every(2)", "provider": "eager", "full_step": 5e-3, "partial_step": 4e-3},
        {"case": "DiT", "schedule": "learned", "provider": "harmonica-rt, fused", "full_step": 9e-3},
        {"case": "DiT", "schedule": "every(2)", "provider": "FirstBlockCache", "full_step": 9e-3},
        {"case": "DiT", "schedule": "every(2)", "provider": "harmonica-rt, inductor", "reason": "out of memory"},
    ]
    rows = [
        predicted("fused", results.FULL),
        predicted("fused", results.PARTIAL),
        predicted("inductor", results.FULL),
        predicted("eager", results.FULL, "none"),
    ]
    found = list(against.compared(measured, rows, "H100 SXM"))
    assert [(each.lowering, each.step, each.predicted, each.measured) for each in found] == [
        ("fused", results.FULL, 2e-3, 3e-3),
        ("eager", results.FULL, 2e-3, 5e-3),
    ]


def test_without_measurements_it_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        against.main([str(tmp_path / "latency-cuda.json")])
    assert "run python -m benchmarks latency --save on a GPU first" in capsys.readouterr().err
