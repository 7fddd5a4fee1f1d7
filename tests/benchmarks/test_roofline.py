"""The roofline: kernels, bytes and FLOPs by hand on tiny graphs, launch counts of real models, and its constants."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("diffusers", reason="the models are diffusers'")

from benchmarks import models
from benchmarks.latency.__main__ import SMALL
from benchmarks.latency.cases import Geometry, geometries
from benchmarks.roofline import predict, prologue, results, show
from benchmarks.roofline.__main__ import main
from benchmarks.roofline.cases import MetaCase, meta_case, on_meta
from benchmarks.roofline.gpus import Gpu, constants, gpus
from benchmarks.roofline.kernel import Extent, Kernel, Kind, work
from benchmarks.roofline.programs import LOWERINGS, UNCACHED, Programs, programs_of, uncached
from benchmarks.roofline.seconds import caches, floor_seconds, host_seconds, seconds_of
from benchmarks.roofline.summary import summary
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.plan.plan import Plan, build_plan
from tests.tiers import member

BF16 = 2  # bytes
D = 1152


class Site(nn.Module):
    """A function with parameters."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.operands = nn.ParameterList(nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.operands)


class OneSite(nn.Module):
    """A model that is one site."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def forward(self, hidden_states: Tensor) -> Any:
        return self.site(hidden_states)


def kernels_of(name: str, function: Callable[..., Any], x: Tensor, *shapes: tuple[int, ...]) -> list[Kernel]:
    model = on_meta(OneSite(Site(function, *shapes)), torch.bfloat16)
    call = CallConvention(model).normalise((), {"hidden_states": x.to("meta", torch.bfloat16)})
    return uncached(name, capture(model, call, ("site",)))


def eager(function: Callable[..., Any], x: Tensor, *shapes: tuple[int, ...]) -> list[Kernel]:
    return kernels_of("eager", function, x, *shapes)


def compiled(function: Callable[..., Any], x: Tensor, *shapes: tuple[int, ...]) -> list[Kernel]:
    return kernels_of("torch.compile", function, x, *shapes)


class TestOneOperator:
    def test_a_linear_layer_is_one_product_that_adds_its_bias(self) -> None:
        [kernel] = eager(F.linear, torch.empty(2, 3, 8), (16, 8), (16,))
        assert (kernel.kind, kernel.extent) == (Kind.PRODUCT, Extent(1, 6, 16, 8))
        assert kernel.read == (6 * 8 + 16 * 8 + 16) * BF16
        assert kernel.written == 6 * 16 * BF16
        assert kernel.flops == 2 * 6 * 8 * 16

    def test_views_cost_nothing_and_a_reshape_that_copies_does(self) -> None:
        assert eager(lambda x: x.transpose(0, 1)[1:].unsqueeze(0), torch.empty(4, 6)) == []
        [kernel] = eager(lambda x: x.transpose(0, 1).reshape(24), torch.empty(4, 6))
        assert (kernel.kind, kernel.read, kernel.written) == (Kind.MEMORY, 24 * BF16, 24 * BF16)

    def test_what_is_broadcast_is_read_once(self) -> None:
        [kernel] = eager(lambda x, gate: x * gate.expand(2, 4, 8), torch.empty(2, 4, 8), (2, 1, 8))
        assert (kernel.read, kernel.written) == ((64 + 16) * BF16, 64 * BF16)

    def test_an_operand_that_is_given_twice_is_read_once(self) -> None:
        [kernel] = eager(lambda x: x * x, torch.empty(5, 7))
        assert (kernel.read, kernel.written) == (35 * BF16, 35 * BF16)

    def test_a_lookup_reads_the_rows_that_it_needs(self) -> None:
        [_, kernel] = eager(lambda x, table: F.embedding(x.long(), table), torch.empty(3), (1000, 8))
        assert (kernel.name, kernel.read, kernel.written) == ("embedding", 3 * 8 * BF16 + 3 * 8, 3 * 8 * BF16)

    def test_a_convolution_adds_its_bias_in_a_second_kernel(self) -> None:
        x = torch.empty(2, 4, 6, 6)
        product, bias = eager(lambda x, w, b: F.conv2d(x, w, b, stride=2), x, (8, 4, 2, 2), (8,))
        assert product.extent == Extent(1, 2 * 9, 8, 16)
        assert product.flops == 2 * (2 * 9) * 8 * 16
        assert bias.read == (2 * 8 * 9 + 8) * BF16

    def test_attention_is_one_kernel_and_its_result_is_joined_from_the_heads_without_a_copy(self) -> None:
        def attend(x: Tensor) -> Tensor:
            query, key, value = (each.unflatten(-1, (3, 4)).transpose(1, 2) for each in x.chunk(3, dim=-1))
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 5, 12)

        [kernel] = eager(attend, torch.empty(2, 5, 36))
        assert (kernel.kind, kernel.extent) == (Kind.ATTENTION, Extent(6, 5, 5, 4))
        assert kernel.flops == 2 * (2 * 6 * 5 * 5 * 4)
        assert (kernel.read, kernel.written) == (3 * 120 * BF16, 120 * BF16)


class TestFusion:
    def test_everything_between_two_products_is_one_kernel(self) -> None:
        def block(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return F.linear(torch.sigmoid(F.linear(x, first)) * 2 + 1, second)

        assert [kernel.name for kernel in compiled(block, torch.empty(4, 8), (8, 8), (8, 8))] == [
            "mm", "sigmoid + mul + add", "mm"
        ]  # fmt: skip

    def test_it_reads_each_input_once_and_writes_only_what_is_read_outside(self) -> None:
        [kernel] = compiled(lambda x, y: ((x + y) * x).relu(), torch.empty(4, 8), (4, 8))
        assert (kernel.read, kernel.written) == (64 * BF16, 32 * BF16)

    def test_it_writes_every_result(self) -> None:
        def two(x: Tensor) -> tuple[Tensor, Tensor]:
            more = x + 1
            return more, more * 2

        [kernel] = compiled(two, torch.empty(4, 8))
        assert (kernel.read, kernel.written) == (32 * BF16, 2 * 32 * BF16)

    def test_a_norm_joins_what_goes_over_as_many_elements(self) -> None:
        x = torch.empty(2, 4, 8)
        assert len(compiled(lambda x: F.layer_norm(x + 1, (8,)) * 2, x)) == 1
        assert len(compiled(lambda x: torch.cat([F.layer_norm(x, (8,)), F.layer_norm(x[:1], (8,))]), x)) == 3

    def test_a_factor_made_before_a_product_is_computed_where_it_is_used(self) -> None:
        kernels = compiled(lambda x, w, scale: F.linear(x, w) * (1 + scale), torch.empty(4, 8), (8, 8), (8,))
        assert [kernel.name for kernel in kernels] == ["mm", "add + mul"]

    @pytest.mark.exhaustive
    @pytest.mark.filterwarnings(
        "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
    )  # Inductor's own use
    def test_the_number_of_kernels_is_close_to_what_inductor_makes_on_a_cpu(self) -> None:
        from torch._inductor.utils import run_and_get_code

        geometry = Geometry("DiT", lambda: models.dit_on_meta(2, 4, 64, 32), geometries()["dit-xl-256"].calls)
        predicted = uncached("torch.compile", meta_case(geometry, 1, 4, torch.float32).captured)
        model = models.randomised(geometry.build()).requires_grad_(False)
        with torch.no_grad():
            compiled_model = torch.compile(model, fullgraph=True, dynamic=False)
            _, codes = run_and_get_code(compiled_model, **geometry.calls(model, 1, 1)[0])
        body = codes[-1].partition("def call(")[2]
        made = re.findall(r"^\s+(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.\S+)\(", body, re.MULTILINE)
        assert len(made) <= len(predicted) <= 1.1 * len(made)


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
    def test_a_block_of_a_full_step_launches_10_kernels(self, two_and_three: tuple[Lowered, Lowered]) -> None:
        two, three = (names(each.full) for each in two_and_three)
        assert three - two == {
            "addmm": 6, "attention": 1, "gelu": 1, "harmonica.residual_reuse_norm_modulate": 2
        }  # fmt: skip
        assert two.total() == 2 * 10 + 9

    def test_a_block_of_a_full_step_moves_these_bytes(self, two_and_three: tuple[Lowered, Lowered]) -> None:
        x, gate = 2 * 256 * D * BF16, 2 * D * BF16  # guidance: two rows
        read = 4 * (x + D * D * BF16 + D * BF16)  # q, k, v, out
        read += 3 * x  # attention
        read += (x + 4 * D * D * BF16 + 4 * D * BF16) + 4 * x + (4 * x + 4 * D * D * BF16 + D * BF16)  # feed-forward
        read += 2 * (2 * x + 3 * gate)  # residual, norm, modulate
        written = 4 * x + x + 4 * x + 4 * x + x + 2 * 2 * x
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
        assert three.total() - two.total() == 13

    @pytest.mark.exhaustive
    def test_dit_xl_2_launches_at_most_286_operators_in_a_full_step(self) -> None:
        full, partial = (names(kernels) for kernels in lowered(dit(28)).programs.kernels)
        # of the patches' convolution; of the patches put together, and of that result for the caller
        assert (full["add (bias)"], full["clone"]) == (1, 2)
        assert full.total() - 3 <= 286
        assert partial.total() <= 10


class TestPixArt:
    def test_a_block_of_a_full_step(self) -> None:
        two, three = (lowered(pixart(layers)) for layers in (2, 3))
        assert names(three.full) - names(two.full) == {
            "addmm": 8,  # keys and values of the text are in the prologue
            "attention": 1,
            "attention (mask)": 1,
            "gelu": 1,
            "harmonica.gated_residual": 1,
            "harmonica.residual_reuse_norm_modulate": 2,
        }
        rows, x = 2 * 4096, 2 * 4096 * D * BF16  # guidance: two images
        _, _, written, flops = (b - a for a, b in zip(work(two.full), work(three.full), strict=True))
        assert written == (7 + 4) * x + 2 * x + 4 * x + 2 * 2 * x + x
        assert flops == 2 * rows * 14 * D * D + 4 * rows * (4096 + 120) * D
        assert len(two.full) == 2 * 14 + 9
        assert len(two.partial) == len(three.partial) == 7


class TestFlux:
    def test_a_double_and_a_single_block(self) -> None:
        one, two = (lowered(flux(blocks)) for blocks in (1, 2))
        assert names(two.full) - names(one.full) == {
            "addmm": 12 + 5,
            "attention": 2,
            "rms_norm": 4 + 2,
            "gelu": 2 + 1,
            "harmonica.residual_reuse_norm_modulate": 4,
            "harmonica.gated_residual": 1,
            "native_layer_norm": 1,
            # rotary embedding, of queries and keys in both blocks
            "_to_copy": 12,
            "mul": 8 + 1,
            "add": 4 + 1,
            "neg": 4,
            "stack": 4,
            "cat": 5,
        }
        tokens, width = 4096 + 512, 3072
        flops = work(two.full)[3] - work(one.full)[3]
        assert flops == 2 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
        assert (len(one.full), len(two.full)) == (77, 150)
        assert (len(one.partial), len(two.partial)) == (10, 12)


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
