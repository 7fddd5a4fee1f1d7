"""GELU in the epilogue of a product: the same values, and only where the library computes that very GELU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harmonica_rt import Schedule, find_sites
from harmonica_rt.lower.epilogue import APPROXIMATIONS, with_epilogues
from harmonica_rt.lower.graph_states import BodyGraph
from harmonica_rt.lower.plain import Program
from tests.lower.test_regions import bodies
from tests.models import stack, stack_call

ON_CPU = {"cpu": "none"}  # what the library computes there; the product leaves it to PyTorch
TARGET = torch.ops.aten._addmm_activation.default


def body_of(model: nn.Module, sites: list[str], dtype: torch.dtype = torch.bfloat16) -> tuple[BodyGraph, Any]:
    """The body that computes everything, and a call."""
    call = {name: value.to(dtype) for name, value in stack_call(0).items()}
    plan, (body,) = bodies(model.to(dtype), call, Schedule.all_compute(steps=2, sites=sites))
    return body, (plan, call)


def products(body: BodyGraph) -> int:
    return sum(node.target is TARGET for node in body.graph.nodes)


def test_the_values_are_those_of_the_two_operators() -> None:
    model = stack()
    body, (plan, call) = body_of(model, find_sites(model))
    merged = with_epilogues(body, ON_CPU)
    assert products(merged) == len(model.blocks)
    assert not any(node.target is torch.ops.aten.gelu.default for node in merged.graph.nodes)
    bound = body.bind(dict(model.named_parameters()), plan.captured.constants)
    hoisted = [torch.randn(2, 1, 8, dtype=torch.bfloat16) for _ in body.hoisted]
    (two,), (one,) = (
        Program(each, plan.captured.root)(bound, [call["latents"], call["timestep"]], [], [], hoisted)
        for each in (body, merged)
    )
    error = torch.linalg.vector_norm(one.double() - two.double()) / torch.linalg.vector_norm(two.double())
    assert error < 2**-7  # a rounding of bf16 per block
    assert one.stride() == two.stride()


def test_it_is_for_gpus_where_the_library_computes_the_tanh_approximation() -> None:
    body, _ = body_of(stack(), find_sites(stack()))
    assert APPROXIMATIONS["cuda"] == "tanh"
    assert "cpu" not in APPROXIMATIONS
    assert with_epilogues(body) is body
    assert with_epilogues(body, {"cpu": "tanh"}) is body  # the model's is exact


def in_fp32(model: Any) -> BodyGraph:
    return body_of(model, find_sites(model), torch.float32)[0]


def without_bias(model: Any) -> BodyGraph:
    for block in model.blocks:
        block.mlp[0].bias = None
    return body_of(model, find_sites(model))[0]


def with_the_product_stored(model: Any) -> BodyGraph:
    call = {name: value.bfloat16() for name, value in stack_call(0).items()}
    sites = [f"blocks.{index}.mlp.0" for index in range(len(model.blocks))]
    _, (full, _) = bodies(model.bfloat16(), call, Schedule.every(2, steps=2, sites=sites))
    assert len(full.stores) == len(sites)
    return full


def with_another_reader(model: Any) -> BodyGraph:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(x) + x

    for block in model.blocks:
        block.mlp[1] = Doubled()
    return body_of(model, find_sites(model))[0]


@pytest.mark.parametrize("make", [in_fp32, without_bias, with_the_product_stored, with_another_reader])
def test_what_does_not_fit_stays(make: Any) -> None:
    body = make(stack())
    assert with_epilogues(body, ON_CPU) is body
