"""Operators that a saved plan may hold, and what they may be called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from harmonica_rt.errors import PlanFileError
from harmonica_rt.planfile.operators import check_arguments, operator_of


@pytest.mark.parametrize(
    "name",
    [
        *("aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.index.Tensor", "aten.view.default"),
        *("aten.mish.default", "operator.getitem", "harmonica.residual_reuse.default", "harmonica.forecast.default"),
    ],
)
def test_what_models_are_made_of_is_allowed(name: str) -> None:
    assert callable(operator_of(name, "x"))


def test_nothing_else_of_torch_is_allowed() -> None:
    """Every operator that is registered: none that is allowed writes, draws, or takes or gives more than values."""
    allowed = []
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        packet, _, overload = rest.partition(".")
        name = f"{namespace}.{packet}.{overload or 'default'}"
        try:
            allowed.append(operator_of(name, "x"))
        except PlanFileError:
            continue
    assert 400 < len(allowed) < 1000
    for target in allowed:
        schema = target._schema
        assert not schema.is_mutable, target
        assert {str(result.type) for result in schema.returns} <= {"Tensor", "List[Tensor]"}, target
        names = target._schema.name
        assert not any(word in names for word in ("file", "empty", "as_strided", "unsafe_index", "resize", "set_")), (
            target
        )
        assert names.startswith(("aten::", "harmonica::")), target
        assert "Storage" not in str(schema), target


def test_arguments_are_those_of_the_schema() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, 3)
    aten: Any = torch.ops.aten
    good: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.mul.Tensor, (x, 0.5), {}),
        (aten.add.Tensor, (1, x), {"alpha": 2}),
        (aten.sum.dim_IntList, (x, [-1], True), {"dtype": torch.float64}),
        (aten.avg_pool1d.default, (x, 2), {}),
        (aten.index.Tensor, (x, [None, x]), {}),
        (aten.gelu.default, (x,), {"approximate": "tanh"}),
        (aten.full.default, ([2, 3], 1.0), {"device": torch.device("cpu"), "pin_memory": False}),
    ]
    for target, args, kwargs in good:
        check_arguments(target, args, kwargs, "x")
    bad: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.mul.Tensor, (x,), {}),
        (aten.mul.Tensor, (x, x, x), {}),
        (aten.mul.Tensor, (x,), {"other": x}),
        (aten.mul.Tensor, (0.5, 0.5), {}),
        (aten.mul.Tensor, (x, "x"), {}),
        (aten.linear.default, (0.5, x), {}),
        (aten.sum.dim_IntList, (x, [True]), {}),
        (aten.sum.dim_IntList, (x, [-1.0]), {}),
        (aten.sum.dim_IntList, (x, [2**63]), {}),
        (aten.sum.dim_IntList, (x, [-1]), {"dtype": "float64"}),
        (aten.gelu.default, (x,), {"approximate": "'+x+'"}),
        (aten.full.default, ([2, 3], 1.0), {"layout": torch.sparse_coo}),
        (aten.full.default, ([2, 3], 1.0), {"device": "cpu"}),
    ]
    for target, args, kwargs in bad:
        with pytest.raises(PlanFileError, match=r"^x: "):
            check_arguments(target, args, kwargs, "x")
