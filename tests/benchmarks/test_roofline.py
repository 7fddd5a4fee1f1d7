"""The roofline as a command, its saved rows and its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the models are diffusers'")

from benchmarks.latency.__main__ import SMALL
from benchmarks.latency.cases import geometries
from benchmarks.roofline import predict, results, show
from benchmarks.roofline.__main__ import main
from benchmarks.roofline.cases import meta_case
from benchmarks.roofline.gpus import gpus
from benchmarks.roofline.programs import LOWERINGS, UNCACHED
from benchmarks.roofline.summary import summary
from tests.tiers import member

SAVED = results.read(results.PATH)
LARGE = [geometry.title for name, geometry in geometries().items() if name not in SMALL]


class TestSavedRows:
    def test_there_are_rows_of_every_case_and_lowering(self) -> None:
        for case in [f"{title}, {images}" for title in LARGE for images in ("1 image", "8 images")]:
            assert {row.lowering for row in SAVED if row.case == case} == {*UNCACHED, *LOWERINGS}

    def test_no_step_is_below_its_floors(self) -> None:
        steps = [row for row in SAVED if row.floor]
        assert {results.FULL, results.PARTIAL} <= {row.step for row in steps}
        for row in steps:
            assert all(row.floor[name] <= row.products[name] <= row.seconds[name] for name in gpus()), row

    @pytest.mark.parametrize(
        "model",
        [
            member("bundled", id="bundled", always=True),
            *(member(name, id=name, always=False) for name in ("dit-xl-256", "pixart-1024", "flux-1024")),
        ],
    )
    def test_they_are_what_is_predicted_now(self, model: str) -> None:
        case = meta_case(geometries()[model], 1, 20, torch.bfloat16)
        saved = {(row.schedule, row.lowering, row.step): row for row in SAVED if row.case == case.name}
        for row in predict.rows_of(case, "every(2)", ("fused",)):
            assert row.work == pytest.approx(saved[row.schedule, row.lowering, row.step].work, rel=1e-5)


def test_the_table_of_the_page_is_that_of_the_saved_rows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "roofline.md").read_text("utf-8")
    assert summary(SAVED) in page


def test_the_command_lists_kernels_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--models", "bundled", "--kernels", "fused", "--part", "partial"])
    lines = capsys.readouterr().out.splitlines()
    assert re.search(rf"fused, partial: {len(lines) - 2} kernels$", lines[0])
    assert lines[1].startswith("Predicted, not measured.")
    places = [i for i, line in enumerate(lines) if "convolution" in line or "harmonica" in line or "addmm" in line]
    assert [lines[i].split()[4] for i in places] == [
        "convolution", "harmonica.residual_reuse", "harmonica.residual_reuse_norm_modulate", "addmm"
    ]  # fmt: skip


def test_the_table_says_that_nothing_is_measured() -> None:
    table = show.table(SAVED, ["H100 SXM"])
    assert table.startswith("Predicted, not measured.")
    assert table.count("| fused |") == len({(row.case, row.schedule) for row in SAVED if row.lowering == "fused"})
