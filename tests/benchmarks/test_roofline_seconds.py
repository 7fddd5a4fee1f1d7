"""Predicted times by hand, and the constants that they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("diffusers", reason="the models are diffusers'")

from benchmarks.roofline.gpus import Gpu, constants, gpus
from benchmarks.roofline.kernel import Extent, Kernel, Kind
from benchmarks.roofline.seconds import floor_seconds, host_seconds, seconds_of
from tests.benchmarks.one_site import BF16, eager

GPU = Gpu("round numbers", {torch.bfloat16: 1e12, torch.float32: 1e11}, 1e9, 10, 1e-6, 1e-6, 0.5, 0.25, 0.5)


class TestSeconds:
    def test_a_kernel_that_does_nothing_takes_its_launch_and_the_shortest_time(self) -> None:
        assert seconds_of(Kernel("nothing", Kind.MEMORY, (), ()), GPU) == pytest.approx(2e-6)

    def test_a_memory_kernel_takes_its_bytes(self) -> None:
        [kernel] = eager(lambda x: x + 1, torch.empty(1000, 1000))
        assert seconds_of(kernel, GPU) == pytest.approx(1e-6 + 4e6 / 0.5e9)

    @pytest.mark.parametrize(("rows", "waves"), [(128, 1), (1280, 1), (1281, 2), (2560, 2)])
    def test_a_product_takes_whole_waves_of_its_best_tile(self, rows: int, waves: int) -> None:
        kernel = Kernel("mm", Kind.PRODUCT, (), (), 2 * rows * 256 * 512, torch.bfloat16, Extent(1, rows, 256, 512))
        tile = 2 * 128 * 256 * 512 / (1e12 * 0.5 / 10)
        assert seconds_of(kernel, GPU) <= 1e-6 + waves * tile * (1 + 1e-9)
        assert seconds_of(kernel, GPU) >= 1e-6 + kernel.flops / (1e12 * 0.5)

    def test_attention_pads_its_depth(self) -> None:
        kernel = Kernel("attention", Kind.ATTENTION, (), (), 1, torch.bfloat16, Extent(10, 128, 64, 72))
        assert seconds_of(kernel, GPU) == pytest.approx(1e-6 + 4 * 128 * 64 * 96 / (1e12 * 0.25 / 10))

    def test_the_floor_has_neither_launches_nor_kernels_that_could_be_fused(self) -> None:
        kernels = eager(lambda x, w: F.linear(x, w) + 1, torch.empty(10, 1000), (1000, 1000))
        product = (10 * 1000 + 1000 * 1000 + 10 * 1000) * BF16
        assert floor_seconds(kernels, 500, GPU) == pytest.approx((product + 500) / 0.5e9)

    def test_the_host_launches_one_by_one(self) -> None:
        kernels = eager(lambda x: (x + 1).relu(), torch.empty(4))
        assert host_seconds(kernels) == pytest.approx(2 * constants()["host"]["operator"]["value"])


class TestConstants:
    def entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for section in ("tiles", "attention", "host"):
            yield from constants()[section].items()
        for table in constants()["gpus"].values():
            yield from table.items()

    def test_each_has_a_source_or_says_that_it_is_assumed(self) -> None:
        for name, entry in self.entries():
            assert set(entry) in ({"value", "source"}, {"value", "assumed"}), name
            assert entry["value"] > 0
            assert "https://" in entry.get("source", "https://") or "the same pages" in entry["source"]

    def test_fractions_are_fractions(self) -> None:
        found = [entry["value"] for name, entry in self.entries() if name.endswith("fraction")]
        assert len(found) == 3 * len(gpus())
        assert all(0 < value <= 1 for value in found)
