"""In-place operations become functional ones, and what they do not touch is not traced again."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn

from harmonica_rt.capture.export import export_functional
from harmonica_rt.errors import CaptureError, Obstacle
from harmonica_rt.graph.functionalise import is_mutating

RETRACE = "torch.export.ExportedProgram.run_decompositions"


class Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


def reads_before_and_after(x: torch.Tensor) -> object:
    table = torch.zeros(4, 6)
    table[1:3] = x[1:3]
    before = table + 1
    table[:, 0] = 7
    odd = table[:, 1::2]
    doubled = odd * 2
    table.mul_(3)
    return before, doubled, odd.sum(), table


def writes_through_views_of_views(x: torch.Tensor) -> object:
    y = x * 2
    left, right = y.view(2, 2, 6).unbind()
    left.transpose(0, 1)[2:4].add_(right[0, :2, None])
    right[1] -= left[0]
    return y, left.exp(), right.t()


def writes_what_it_wrote(x: torch.Tensor) -> object:
    first, second = torch.zeros_like(x), torch.ones_like(x)
    first[:2] = x[:2]
    second[2:] = first[:2]
    first[2:] = second[2:].cos()
    return first.masked_fill_(x > 0, 0.5), second


def writes_what_several_values_share(x: torch.Tensor) -> object:
    values, order = x.sort(dim=-1)
    values[:, :3].cumsum_(-1)
    parts = values.split(2, dim=1)
    parts[1].index_put_((torch.tensor([0, 3]),), torch.tensor(9.0))
    return order, values, [part.sum(0) for part in parts]


def writes_one_of_two_names(x: torch.Tensor) -> object:
    y = x.exp()
    same = y.to(torch.float32).contiguous()
    same[0] = 0
    return y


def writes_a_part_of_what_comes_together(x: torch.Tensor) -> object:
    scores = x.softmax(-1)
    scores.masked_fill_(scores < 0.1, 0)
    weights, places = scores.topk(2)
    weights /= weights.sum(-1, keepdim=True)
    rows = torch.arange(4.0)
    rows += 0.5
    down, across = torch.meshgrid(rows, torch.arange(6.0), indexing="ij")
    return weights, places, down, across


def writes_what_was_a_list(x: torch.Tensor) -> object:
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    scale *= 2
    return x * scale


def writes_around_autocast(x: torch.Tensor) -> object:
    y = x.exp()
    y[0] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = y @ y.t()
    y[1] = 2
    return z, y


def writes_before_and_after_products(x: torch.Tensor) -> object:
    q = x[None, None] * 2
    q *= 2
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    out += 1
    return torch.nn.functional.linear(out, x) * 2


PARTS = [
    reads_before_and_after,
    writes_through_views_of_views,
    writes_what_it_wrote,
    writes_what_several_values_share,
    writes_one_of_two_names,
    writes_a_part_of_what_comes_together,
    writes_what_was_a_list,
    writes_around_autocast,
    writes_before_and_after_products,
]


@pytest.mark.parametrize("function", PARTS, ids=lambda function: function.__name__)
def test_values_are_those_of_the_writes(function: Callable[..., object]) -> None:
    x = torch.randn(4, 6)
    with mock.patch(RETRACE, side_effect=RuntimeError("traced again")):
        program = export_functional(Function(function), (x,), {})
    assert not any(map(is_mutating, program.graph.nodes))
    program.graph.lint()
    torch.testing.assert_close(_run(program, x), function(x), rtol=0, atol=0)


def of_a_layout_with_gaps(x: torch.Tensor) -> object:
    y = torch.empty_strided((4, 6), (1, 8))
    y.copy_(x)
    return y.mul_(2).exp()


def under_vmap(x: torch.Tensor) -> object:
    return torch.vmap(lambda row: row.exp().mul_(2))(x)


def seen_by_a_nested_graph(x: torch.Tensor) -> object:
    y = x.exp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = y.t()
    y[0] = 0
    return turned @ x


def combines_masks(x: torch.Tensor) -> object:
    mask = x > 1
    mask |= x < 0
    return x * mask


def norms_in_between(x: torch.Tensor) -> object:
    y = x.exp()
    y += x
    normed = torch.nn.functional.rms_norm(y, (6,))
    normed *= 2
    return normed, y


def two_views_out_of_a_nested_graph(x: torch.Tensor) -> object:
    with torch.autocast("cpu", enabled=False):
        y = x.exp()
        top = y[:2]
    top *= 2
    y += 1
    return y, top


def writes_in_a_nested_graph(x: torch.Tensor) -> object:
    y, other = x.exp(), x.sin()
    before = y.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y[1] = 5.0
        product = other @ other.t()
    return before, product, y


WHOLE = [
    of_a_layout_with_gaps,
    under_vmap,
    seen_by_a_nested_graph,
    combines_masks,
    two_views_out_of_a_nested_graph,
    writes_in_a_nested_graph,
]


@pytest.mark.parametrize("function", WHOLE, ids=lambda function: function.__name__)
def test_where_strides_or_storages_do_not_tell_all_is_traced_again(function: Callable[..., object]) -> None:
    x = torch.randn(4, 6)
    with mock.patch(RETRACE, autospec=True, side_effect=torch.export.ExportedProgram.run_decompositions) as retrace:
        program = export_functional(Function(function), (x,), {})
    assert retrace.called
    assert not any(map(is_mutating, program.graph.nodes))
    torch.testing.assert_close(_run(program, x), function(x), rtol=0, atol=0)


def test_a_norm_between_writes() -> None:
    x = torch.randn(4, 6)
    program = export_functional(Function(norms_in_between), (x,), {})
    assert not any(map(is_mutating, program.graph.nodes))
    torch.testing.assert_close(_run(program, x), norms_in_between(x), rtol=0, atol=0)


def test_products_stay_as_the_model_wrote_them() -> None:
    program = export_functional(Function(writes_before_and_after_products), (torch.randn(4, 6),), {})
    targets = {node.target for node in program.graph.nodes}
    assert {torch.ops.aten.linear.default, torch.ops.aten.scaled_dot_product_attention.default} <= targets


def test_what_writes_to_an_argument_through_a_view_is_refused() -> None:
    with pytest.raises(CaptureError, match="it writes to x") as error:
        export_functional(Function(lambda x: x.t()[0].zero_() + 1), (torch.randn(4, 6),), {})
    assert error.value.failure.obstacle is Obstacle.MUTATION


class Fills(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        return y


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fill = Fills()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fill(x) + 1


def test_what_is_written_inside_a_module_stays_inside() -> None:
    program = export_functional(Shifts(), (torch.randn(2, 4),), {})
    inside = {
        str(node.target)
        for node in program.graph.nodes
        if "fill" in [p for p, _ in _stack(node)] and node.op != "output"
    }
    assert {"aten.copy.default", "aten.slice_scatter.default"} <= inside
    add = next(iter(program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)))
    assert [path for path, _ in _stack(add)] == [""]


def _stack(node: torch.fx.Node) -> list[tuple[str, object]]:
    return list(node.meta.get("nn_module_stack", {}).values())


def _run(program: torch.export.ExportedProgram, x: torch.Tensor) -> object:
    module = torch.fx.GraphModule(program.graph_module, program.graph)
    constants = [program.constants[spec.target] for spec in program.graph_signature.input_specs if spec.target]
    return torch.utils._pytree.tree_unflatten(module(*constants, x), program.call_spec.out_spec)
