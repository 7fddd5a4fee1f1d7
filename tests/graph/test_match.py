"""Declared patterns against small traced graphs: what they bind, and what keeps them from matching."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from harmonica_rt.graph.match import Anything, LastDim, Number, Op, Operand, matches

aten = torch.ops.aten

GATED_SUM = Op(
    (aten.add.Tensor,), (Operand("x"), Op((aten.mul.Tensor,), (Operand("y"), Operand("gate")))), commutes=True
)
MEAN = Op((aten.mean.dim,), (Operand("x"), LastDim(), True))


def traced(function: Callable[..., Tensor], count: int) -> fx.Node:
    """The node that computes the result of a function of `count` tensors of shape [2, 3]."""
    graph = make_fx(function)(*(torch.ones(2, 3) for _ in range(count))).graph
    (result,) = graph.output_node().all_input_nodes
    return result


def names(bound: dict[str, object]) -> dict[str, str]:
    return {name: str(node) for name, node in bound.items()}


def test_a_sum_with_a_product_binds_its_operands() -> None:
    found = list(matches(GATED_SUM, traced(lambda x, y, gate: x + y * gate, 3)))
    assert [names(dict(bound)) for bound in found] == [{"x": "x_1", "y": "y_1", "gate": "gate_1"}]


def test_operands_that_commute_match_either_way_round() -> None:
    found = list(matches(GATED_SUM, traced(lambda x, y, gate: y * gate + x, 3)))
    assert [names(dict(bound)) for bound in found] == [{"x": "x_1", "y": "y_1", "gate": "gate_1"}]


def test_a_product_that_is_used_elsewhere_is_no_part_of_a_match() -> None:
    def shared(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        product = y * gate
        return (x + product) + product.sum()

    outer = traced(shared, 3)
    inner = outer.args[0]
    assert isinstance(inner, fx.Node)
    assert inner.target is aten.add.Tensor
    assert list(matches(GATED_SUM, inner)) == []


def test_a_name_that_occurs_twice_stands_for_one_node() -> None:
    square = Op((aten.mul.Tensor,), (Operand("x"), Operand("x")))
    assert list(matches(square, traced(lambda x, y: x * y, 2))) == []
    assert len(list(matches(square, traced(lambda x: x * x, 1)))) == 1


def test_an_argument_that_is_not_listed_has_its_default() -> None:
    plain = Op((aten.add.Tensor,), (Operand("x"), Operand("y")))
    assert len(list(matches(plain, traced(lambda x, y: torch.add(x, y), 2)))) == 1
    assert list(matches(plain, traced(lambda x, y: torch.add(x, y, alpha=2), 2))) == []


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_an_argument_may_be_anything(dtype: torch.dtype | None) -> None:
    mean = Op((aten.mean.dim,), (Operand("x"), LastDim(), True, Anything()))
    assert len(list(matches(mean, traced(lambda x: x.mean(-1, keepdim=True, dtype=dtype), 1)))) == 1


@pytest.mark.parametrize(("dim", "matched"), [(-1, True), (1, True), (0, False)])
def test_the_last_dimension_may_be_counted_from_either_end(dim: int, matched: bool) -> None:
    assert bool(list(matches(MEAN, traced(lambda x: x.mean(dim, keepdim=True), 1)))) == matched


def test_a_mean_that_drops_its_dimension_is_another_one() -> None:
    assert list(matches(MEAN, traced(lambda x: x.mean(-1), 1))) == []


def test_a_number_is_bound_and_a_plain_value_compared() -> None:
    shifted = Op((aten.add.Tensor,), (Operand("x"), Number("eps")))
    (bound,) = matches(shifted, traced(lambda x: x + 1e-6, 1))
    assert bound["eps"] == 1e-6
    one_more = Op((aten.add.Tensor,), (Operand("x"), 1))
    assert len(list(matches(one_more, traced(lambda x: x + 1, 1)))) == 1
    assert list(matches(one_more, traced(lambda x: x + 2, 1))) == []
