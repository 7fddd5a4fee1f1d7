"""The comparison of forecasts: intervals on known figures, pairing, and peers that compute what they are said to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the digits model is a diffusers pipeline")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("torchmetrics", reason="PSNR is torchmetrics'")

import harmonica_rt as hrt
from benchmarks.quality.forecasts import cells, latency, methods, peers, table
from harmonica_rt import Schedule, find_sites
from tests.tiny import built, shallow_dit

CALL: dict[str, Any] = {
    **{"class_labels": [1], "guidance_scale": 1.0},
    **{"num_inference_steps": methods.STEPS, "output_type": "np"},
}


def row(method: str, seed: int, psnr: list[float], level: str = "sublayer") -> dict[str, Any]:
    head = {"schedule": "every(2)", "level": level, "method": method, "seed": seed, "setting": {"order": 1}}
    return {**head, "speedup": 2.0, "psnr_of_images": psnr}


def test_an_interval_holds_the_mean_and_shrinks_with_more_images() -> None:
    generator = np.random.default_rng(0)
    few, many = (table.Interval.of([generator.normal(40, 3, size=count) for _ in range(3)]) for count in (10, 1000))
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    assert many.high - many.low == pytest.approx(2 * 1.96 * 3 / np.sqrt(3000), rel=0.1)  # of a normal mean
    same = table.Interval.of([np.full(5, 40.0)])
    assert (same.low, same.mean, same.high) == (40.0, 40.0, 40.0)


def test_gains_are_those_of_the_same_images() -> None:
    rows = [
        *(row("Taylor", seed, [40.0, 44.0 + seed]) for seed in (0, 1)),
        *(row("fitted", seed, [41.5, 45.5 + seed]) for seed in (0, 1, 2)),
        row("diffusers", 0, [39.0, 43.0], level=cells.PEER),
        {"schedule": "every(2)", "level": cells.PEER, "method": "cache-dit", "seed": 0, "reason": "not installed"},
    ]
    found = {line.method: line for line in table.lines(rows, {("every(2)", "sublayer", "fitted"): 0.25})}
    gain = found["fitted"].gain
    assert (gain.low, gain.mean, gain.high) == (1.5, 1.5, 1.5)
    assert found["diffusers"].gain.mean == -1.0
    assert found["fitted"].seeds == 3
    assert "cache-dit" not in found
    text = table.markdown(found.values())
    assert "| every(2) | sublayer | fitted | order 1 | 2.00x | 44.00 (" in text
    assert "| 0.250 |" in text


def test_every_cell_is_listed_once_and_has_a_method() -> None:
    found = cells.cells()
    assert len(found) == len(set(found))
    assert {cell.seed for cell in found} == set(cells.SEEDS)
    assert not {cells.TUNING_SEED, *(cells.FIT_SEED + seed for seed in cells.SEEDS)} & set(cells.SEEDS)
    for cell in found:
        assert cell.name in (peers.PEERS if cell.level == cells.PEER else methods.METHODS)
        assert cell.schedule != "bundled" or cell.level == "sublayer"


def test_taylorseer_of_diffusers_is_taylor_on_its_mask() -> None:
    """Its mask computes step 0 and every k-th step from step 2 on."""
    pipeline, k = built(shallow_dit), 3
    mask = [step == 0 or (step - 2) % k == 0 for step in range(methods.STEPS)]
    schedule = Schedule.from_mask([int(computed) for computed in mask], sites=find_sites(pipeline.transformer))

    def images(call: Any) -> Any:
        return np.array(call(**CALL, generator=torch.Generator().manual_seed(0)).images)

    with peers.PEERS["diffusers"](pipeline, k, predicts="sub-layers", order=1) as call:
        first, again = images(call), images(call)
        speedup = peers.counted_speedup(pipeline.transformer, lambda: images(call))
    hrt.reference(pipeline, schedule.with_taylor(1))
    expected = images(pipeline)
    hrt.uncompile(pipeline)
    assert np.array_equal(first, again)
    assert np.abs(first - expected).max() < 1e-4
    assert sum(mask) == len(range(0, methods.STEPS, k))  # as many as every(k) computes
    assert 1.0 < speedup < methods.STEPS / sum(mask)
    assert np.array_equal(images(pipeline), images(pipeline))
    assert not any(
        module._diffusers_hook.hooks for module in pipeline.transformer.modules() if hasattr(module, "_diffusers_hook")
    )


def test_a_peer_that_is_not_installed_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    cell = cells.Cell("every(2)", cells.PEER, "cache-dit", 0)
    assert cells.Comparison(None, 2, {}).row(cell)["reason"] == "not installed"


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.Comparison, "row", lambda self, cell: {**cell.__dict__, "psnr": 1.0})
    chosen = [cell for cell in cells.cells() if cell.method == "reuse"]
    path = tmp_path / "rows.json"
    assert len(list(cells.run(None, 2, path, chosen[:3]))) == 3
    assert len(list(cells.run(None, 2, path, chosen))) == len(chosen) - 3
    assert latency.medians(tmp_path / "none.json") == {}
