"""Launch counts and bytes of full and partial steps: DiT-XL/2, PixArt and Flux, by block."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the models are diffusers'")

from benchmarks import models
from benchmarks.latency.cases import Geometry, geometries
from benchmarks.roofline import prologue
from benchmarks.roofline.cases import MetaCase, meta_case
from benchmarks.roofline.kernel import Kernel, Kind, work
from benchmarks.roofline.programs import Programs, programs_of
from benchmarks.roofline.seconds import caches
from harmonica_rt.plan.plan import Plan, build_plan
from tests.benchmarks.one_site import BF16

D = 1152


def dit(layers: int) -> MetaCase:
    build = lambda: models.dit_on_meta(layers, 16, 72, 32)  # noqa: E731
    return meta_case(Geometry("DiT-XL/2 256", build, geometries()["dit-xl-256"].calls), 1, 4, torch.bfloat16)


def pixart(layers: int) -> MetaCase:
    def build() -> nn.Module:
        model = geometries()["pixart-1024"].build()
        model.transformer_blocks = model.transformer_blocks[:layers]  # type: ignore[index]
        return model

    return meta_case(Geometry("PixArt 1024", build, geometries()["pixart-1024"].calls), 1, 4, torch.bfloat16)


def flux(blocks: int) -> MetaCase:
    return meta_case(geometries((blocks, blocks))["flux-1024"], 1, 4, torch.bfloat16)


class Lowered(NamedTuple):
    """A case under every(2), lowered."""

    plan: Plan
    programs: Programs

    @property
    def full(self) -> list[Kernel]:
        return self.programs.kernels[0]

    @property
    def partial(self) -> list[Kernel]:
        return self.programs.kernels[1]


def lowered(case: MetaCase, name: str = "fused") -> Lowered:
    plan = build_plan(case.captured, case.schedules["every(2)"])
    return Lowered(plan, programs_of(name, plan, case.roles))


def names(kernels: list[Kernel]) -> Counter[str]:
    return Counter(kernel.name for kernel in kernels)


@pytest.fixture(scope="module")
def two_and_three() -> tuple[Lowered, Lowered]:
    """DiT-XL/2 of 2 and of 3 blocks; their difference is one block."""
    return lowered(dit(2)), lowered(dit(3))


class TestDiT:
    def test_a_block_of_a_full_step_launches_7_kernels(self, two_and_three: tuple[Lowered, Lowered]) -> None:
        two, three = (names(each.full) for each in two_and_three)
        assert three - two == {
            "addmm": 3, "addmm (gelu)": 1, "attention": 1, "harmonica.residual_reuse_norm_modulate": 2
        }  # fmt: skip
        assert two.total() == 2 * 7 + 9  # queries, keys and values are one product

    def test_a_block_of_a_full_step_moves_these_bytes(self, two_and_three: tuple[Lowered, Lowered]) -> None:
        x, gate = 2 * 256 * D * BF16, 2 * D * BF16  # guidance: two rows
        read = 2 * x + 4 * (D * D * BF16 + D * BF16)  # q, k and v together, out
        read += 3 * x  # attention
        read += (x + 4 * D * D * BF16 + 4 * D * BF16) + (4 * x + 4 * D * D * BF16 + D * BF16)  # feed-forward
        read += 2 * (2 * x + 3 * gate)  # residual, norm, modulate
        written = 4 * x + x + 4 * x + x + 2 * 2 * x
        two, three = (work(each.full) for each in two_and_three)
        assert (three[1] - two[1], three[2] - two[2]) == (read, written)
        assert three[3] - two[3] == 2 * 512 * (4 * D * D + 8 * D * D) + 2 * (2 * 2 * 16 * 256 * 256 * 72)

    def test_a_partial_step_is_one_fused_kernel_between_the_patches_and_the_output(
        self, two_and_three: tuple[Lowered, Lowered]
    ) -> None:
        for blocks, each in zip((2, 3), two_and_three, strict=True):
            assert len(each.partial) == 7
            [fused] = [kernel for kernel in each.partial if kernel.kind is Kind.HARMONICA]
            assert caches(fused) == 2 * blocks
            x, gate = 2 * 256 * D * BF16, 2 * D * BF16
            assert (fused.read, fused.written) == ((1 + 2 * blocks) * x + (2 * blocks + 2) * gate, 2 * x)

    def test_plain_copies_what_it_stores_and_fused_does_not(self, two_and_three: tuple[Lowered, Lowered]) -> None:
        assert names(lowered(dit(2), "plain").full)["copy_"] == 4
        assert "copy_" not in names(two_and_three[0].full)

    def test_a_step_without_a_forecast_launches_the_timestep_part_of_every_block(
        self, two_and_three: tuple[Lowered, Lowered]
    ) -> None:
        parts = []
        for plan, programs in two_and_three:
            assert programs.prologue is not None
            parts.append(names(prologue.of_step(programs.prologue, plan)))
        two, three = parts
        assert (three - two)["addmm"] == 3  # two of the embedding, one of the modulation
        assert three - two == {"addmm": 3, "silu": 2, "add": 1}  # the timestep itself is embedded once for all blocks

    def test_before_a_run_a_block_launches_14_kernels(self, two_and_three: tuple[Lowered, Lowered]) -> None:
        two, three = (
            names(prologue.of_run(programs.prologue, plan))
            for plan, programs in two_and_three
            if programs.prologue is not None
        )
        # a batched linear layer adds its bias by two more; one copy takes six values to the table
        assert three - two == {"mm": 3, "mul": 3, "add": 1 + 3, "silu": 2, "embedding": 1, "copy_": 1}

    def test_joined_parameters_are_copied_by_one_kernel_before_the_steps(
        self, two_and_three: tuple[Lowered, Lowered]
    ) -> None:
        for blocks, (plan, programs) in zip((2, 3), two_and_three, strict=True):
            assert programs.prologue is not None
            copies = [kernel for kernel in prologue.of_run(programs.prologue, plan) if kernel.name == "copy_"]
            nbytes = blocks * 3 * (D + 1) * D * BF16
            assert sum(tensor.nbytes for tensor in programs.prologue.joined) == nbytes
            assert sum((kernel.read, kernel.written) == (nbytes, nbytes) for kernel in copies) == 1
            assert max(kernel.read for kernel in programs.around[0]) < nbytes  # not in the row of each step

    @pytest.mark.exhaustive
    def test_dit_xl_2_launches_at_most_202_operators_in_a_full_step(self) -> None:
        full, partial = (names(kernels) for kernels in lowered(dit(28)).programs.kernels)
        # of the patches' convolution; of the patches put together, and of that result for the caller
        assert (full["add (bias)"], full["clone"]) == (1, 2)
        assert full.total() - 3 <= 202
        assert partial.total() <= 10


class TestPixArt:
    def test_a_block_of_a_full_step(self) -> None:
        two, three = (lowered(pixart(layers)) for layers in (2, 3))
        assert names(three.full) - names(two.full) == {
            "addmm": 7,  # too large to gain by joining; keys and values of the text are in the prologue
            "addmm (gelu)": 1,
            "attention": 1,
            "attention (mask)": 1,
            "harmonica.gated_residual": 1,
            "harmonica.residual_reuse_norm_modulate": 2,
        }
        rows, x = 2 * 4096, 2 * 4096 * D * BF16  # guidance: two images
        _, _, written, flops = (b - a for a, b in zip(work(two.full), work(three.full), strict=True))
        assert written == (7 + 4) * x + 2 * x + 2 * 2 * x + x
        assert flops == 2 * rows * 14 * D * D + 4 * rows * (4096 + 120) * D
        assert len(two.full) == 2 * 13 + 9
        assert len(two.partial) == len(three.partial) == 7


class TestFlux:
    def test_a_double_and_a_single_block(self) -> None:
        one, two = (lowered(flux(blocks)) for blocks in (1, 2))
        assert names(two.full) - names(one.full) == {
            "addmm": 10 + 4,
            "addmm (gelu)": 2 + 1,
            "attention": 2,
            "harmonica.norm_rotary": 2,
            "harmonica.residual_reuse_norm_modulate": 4,
            "harmonica.gated_residual": 1,
            "native_layer_norm": 1,
            "mul": 1,
            "add": 1,
            "cat": 3,
        }
        tokens, width = 4096 + 512, 3072
        flops = work(two.full)[3] - work(one.full)[3]
        assert flops == 2 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
        assert (len(one.full), len(two.full)) == (38, 70)
        assert (len(one.partial), len(two.partial)) == (10, 12)
