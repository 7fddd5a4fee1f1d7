"""The quality benchmark: figures on known inputs, pairing, producers at equal cost, and going on where it stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the digits model is a diffusers pipeline")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("torchmetrics", reason="PSNR and SSIM are torchmetrics'")

from benchmarks import rows
from benchmarks.quality import images, matrix, pareto
from benchmarks.quality.cost import costs_of
from benchmarks.quality.matrix import Cell, Settings
from benchmarks.quality.metrics import Judge
from benchmarks.quality.producers import PRODUCERS, QUICK, Point
from harmonica_rt import Schedule, compile, get_compiled, uncompile
from harmonica_rt.demo import bundled_model
from harmonica_training.costs import SiteCosts
from harmonica_training.digits import load_classifier

COUNT = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return matrix._pipeline("cpu")  # the one of the matrix, so that costs are counted once


@pytest.fixture(scope="module")
def costs(pipeline: Any) -> SiteCosts:
    return costs_of(pipeline.transformer)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(load_classifier(bundled_model() / "classifier"), squares(20, shade=100).float() / 255)


def squares(count: int, shade: int) -> Tensor:
    """uint8 images `[count, 1, 64, 64]`, no two alike."""
    found = torch.full((count, 1, 64, 64), shade, dtype=torch.uint8)
    for index in range(count):
        found[index, :, 8 : 16 + 2 * index] = 200
    return found


def test_equal_images_have_no_psnr_and_no_distance(judge: Judge) -> None:
    found = squares(20, shade=100)
    measured = judge.measure(found, found.clone(), images.requested_labels(20))
    assert (measured.psnr, measured.identical, measured.ssim) == (None, 20, 1.0)
    assert 0.0 <= measured.frechet_to_uncached < 1e-3
    assert 0.0 <= measured.frechet_to_real < 1e-3


def test_psnr_is_the_mean_over_images_that_differ(judge: Judge) -> None:
    truth = squares(4, shade=100)
    found = truth.clone()
    found[1] += 5
    found[2] += 10
    measured = judge.measure(found, truth, images.requested_labels(4))
    assert measured.identical == 2
    assert measured.psnr == pytest.approx((20 * math.log10(255 / 5) + 20 * math.log10(255 / 10)) / 2, abs=1e-3)
    assert 0.5 < measured.ssim < 1.0
    assert measured.frechet_to_uncached > 0.0
    with pytest.raises(ValueError, match="as many uncached images"):
        judge.measure(found, truth[:2], images.requested_labels(4))


def test_images_are_paired_by_index_whatever_the_batch_and_the_schedule(pipeline: Any, costs: SiteCosts) -> None:
    plain = Schedule.all_compute(steps=2, sites=costs.sites)
    at_once = images.generate(pipeline, plain, count=5, seed=3, batch=5)
    in_parts = images.generate(pipeline, plain, count=5, seed=3, batch=2)
    assert (at_once.int() - in_parts.int()).abs().max() <= 1  # float rounding, next to a half
    reused = images.generate(pipeline, Schedule.every(2, steps=2, sites=costs.sites), count=5, seed=3, batch=5)
    distances = torch.cdist(reused.flatten(1).float(), at_once.flatten(1).float())
    assert torch.equal(distances.argmin(dim=1), torch.arange(5))
    assert not torch.equal(reused, at_once)
    assert not torch.equal(images.generate(pipeline, plain, count=5, seed=4, batch=5), at_once)


def test_cost_is_that_of_the_runtimes_plan(pipeline: Any, costs: SiteCosts) -> None:
    schedule = Schedule.random(0.4, steps=3, sites=costs.sites, seed=1)
    compile(pipeline, schedule, strict=True)
    pipeline(class_labels=[1], num_inference_steps=3, output_type="pt")
    planned = get_compiled(pipeline).report().plans[0].theoretical_speedup
    uncompile(pipeline)
    assert costs.speedup(schedule.compute) == pytest.approx(planned, rel=1e-12)


@pytest.mark.parametrize("point", matrix.SEEDS, ids=str)
def test_producers_come_as_near_as_they_can(pipeline: Any, costs: SiteCosts, point: Point) -> None:
    made = {name: PRODUCERS[name](pipeline, point, 0, QUICK).schedule for name in ("random", "fora", "fewer-steps")}
    assert costs.speedup(made["random"].compute) == pytest.approx(point.speedup, rel=0.01)

    fora = made["fora"].compute
    assert (fora == fora[:, :1]).all()
    computed = torch.from_numpy(fora[:, 0].copy()).nonzero().flatten()
    assert computed.diff().max() - computed.diff().min() <= 1
    off = abs(costs.speedup(made["fora"].compute) - point.speedup)
    for other in (len(computed) - 1, len(computed) + 1):
        rows = "1" * other + "0" * (point.steps - other)
        assert off <= abs(costs.speedup(Schedule.from_mask(rows, sites=costs.sites).compute) - point.speedup)

    assert made["fewer-steps"].cur == 0.0
    every = range(1, point.steps + 1)
    assert made["fewer-steps"].steps == min(every, key=lambda steps: abs(point.steps / steps - point.speedup))


def test_matrix_is_finished_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = tmp_path / "results"
    published.mkdir()
    monkeypatch.setattr("benchmarks.rows.RESULTS", published)
    settings = Settings.of(COUNT, quick=True, root=tmp_path)
    chosen = matrix.cells(["fora", "fewer-steps"], [Point(10, 1.3)])
    assert [str(cell) for cell in chosen] == ["fora-t10-1.3x-seed0", "fewer-steps-t10-1.3x-seed0"]

    first = next(run := matrix.run(chosen, settings))  # broken off after the uncached images
    run.close()
    assert (first["method"], first["speedup"], first["identical"], first["psnr"]) == ("uncached", 1.0, COUNT, None)

    rest = {row["method"]: row for row in matrix.run(chosen, settings)}
    assert list(rest) == ["fora", "fewer-steps"]
    kept = rows.read(settings.rows)
    assert {row["method"] for row in kept} == {"uncached", *rest}
    for row in rest.values():
        assert row in kept
        assert row["images"] == COUNT
        assert 1.2 < row["speedup"] < 1.4
        assert 10.0 < row["psnr"] < 60.0
        assert row["machine"]["torch"] == torch.__version__
    assert (rest["fora"]["computed_steps"], rest["fewer-steps"]["computed_steps"]) == (10, 8)
    schedule = Schedule.load(settings.schedules / "fora-t10-1.3x-seed0.json")
    assert schedule.model is not None
    assert schedule.guidance == 2.0
    assert rest["fora"]["cur"] == pytest.approx(schedule.cur, rel=1e-5)

    before = settings.rows.read_bytes()
    for path in settings.work.glob("*.npz"):
        path.unlink()  # what is finished needs none of them
    assert list(matrix.run(chosen, settings)) == []
    assert settings.rows.read_bytes() == before
    assert list(published.iterdir()) == []


def test_trials_are_kept_apart(tmp_path: Path) -> None:
    published = Settings.of(matrix.IMAGES["cpu"], quick=False, root=tmp_path)
    assert published.rows.name == "quality-cpu.json"
    assert published.picture == tmp_path / "docs" / "quality-cpu.png"
    for trial in (
        Settings.of(50, quick=False, root=tmp_path),
        Settings.of(matrix.IMAGES["cpu"], quick=True, root=tmp_path),
    ):
        assert trial.rows != published.rows
        assert trial.rows.is_relative_to(tmp_path / ".bench")
        assert trial.picture.is_relative_to(tmp_path / ".bench")


def test_a_row_takes_the_place_of_its_older_self(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for value, seed in ((1.0, 0), (2.0, 1), (3.0, 0)):
        matrix._add(path, row("fora", 1.5, seed=seed, psnr=value))
    assert [(one["seed"], one["psnr"]) for one in rows.read(path)] == [(0, 3.0), (1, 2.0)]
    assert len(path.read_text().splitlines()) == 6  # one line per row
    assert list(tmp_path.iterdir()) == [path]


def test_summary_spreads_over_seeds_and_is_drawn(tmp_path: Path) -> None:
    rows = [
        row("fora", 1.5, seed=0, psnr=20.0),
        row("fora", 1.5, seed=1, psnr=24.0),
        row("fora", 1.3, seed=0, psnr=30.0),
        row("uncached", 1.0, seed=0, psnr=None),
    ]
    summaries = pareto.summarise(rows)
    assert [(one.method, one.target, one.seeds) for one in summaries] == [
        ("uncached", 1.0, 1),
        ("fora", 1.3, 1),
        ("fora", 1.5, 2),
    ]
    assert summaries[2].metrics["psnr"] == pareto.SeedRange(22.0, 20.0, 24.0)
    lines = pareto.table(summaries).splitlines()
    assert lines[-1].startswith("| fora | 20 | 1.5 | 2 | 22 (20 - 24) |")
    assert lines[2].startswith("| uncached | 20 | 1 | 1 | - |")
    pareto.draw(summaries, tmp_path / "docs" / "quality-cpu.png")
    assert (tmp_path / "docs" / "quality-cpu.png").read_bytes().startswith(b"\x89PNG")


def row(method: str, speedup: float, *, seed: int, psnr: float | None) -> dict[str, Any]:
    figures = {"psnr": psnr, "ssim": 0.9, "frechet_to_uncached": 1.0, "frechet_to_real": 40.0, "accuracy": 0.99}
    return {**matrix._head(Cell(method, Point(20, speedup), seed)), "speedup": speedup, **figures}
