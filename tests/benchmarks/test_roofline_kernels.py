"""Kernels, bytes and FLOPs of tiny graphs, by hand, and what is joined in a compiled region."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers", reason="the models are diffusers'")

from benchmarks import models
from benchmarks.latency.cases import Geometry, geometries
from benchmarks.roofline.cases import meta_case
from benchmarks.roofline.kernel import Extent, Kind
from benchmarks.roofline.programs import uncached
from tests.benchmarks.one_site import BF16, compiled, eager


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
