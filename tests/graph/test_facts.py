"""What is known of a node: whether it views memory, whose, and what it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from harmonica_rt.graph.facts import is_item, is_view, may_alias_argument, needed_nodes, owner
from harmonica_rt.graph.rebuild import Rebuild, copy_of


def traced(function: Callable[[Tensor], object]) -> fx.Graph:
    """The graph of a function of one tensor of shape [4, 6]."""
    return make_fx(function)(torch.ones(4, 6)).graph


def result(graph: fx.Graph) -> fx.Node:
    (node,) = graph.output_node().all_input_nodes
    return node


@pytest.mark.parametrize(
    ("function", "views", "aliases"),
    [
        pytest.param(lambda x: x.transpose(0, 1), True, True, id="transpose"),
        pytest.param(lambda x: x.chunk(2)[1], True, True, id="item-of-views"),
        pytest.param(lambda x: x + 1, False, False, id="sum"),
        pytest.param(lambda x: (x + 1)[0], True, False, id="view-of-a-sum"),
        pytest.param(lambda x: torch.ops.aten.native_layer_norm(x, [6], None, None, 1e-5)[0], False, False, id="item"),
    ],
)
def test_views_and_aliases_of_arguments(function: Callable[[Tensor], object], views: bool, aliases: bool) -> None:
    node = result(traced(function))
    assert is_view(node) == views
    if not is_item(node):  # for an item the worst is assumed
        assert may_alias_argument(node) == aliases


def test_the_owner_of_a_view_of_a_view_is_the_node_that_made_the_memory() -> None:
    graph = traced(lambda x: (x + 1).chunk(2)[0].transpose(0, 1))
    assert str(owner(result(graph)).target) == "aten.add.Tensor"
    assert owner(result(traced(lambda x: x.view(-1)))).op == "placeholder"


def test_needed_nodes_stop_at_a_cut() -> None:
    graph = traced(lambda x: ((x + 1) * 2).sin())
    sine = result(graph)
    (product,) = sine.all_input_nodes
    assert needed_nodes([sine, None, 3]) == {node for node in graph.nodes if node.op != "output"}
    assert needed_nodes([sine], {product}) == {sine, product}


def test_a_rebuilt_graph_shares_no_node_and_computes_the_same() -> None:
    def function(x: Tensor) -> Tensor:
        return (x + 1).sin() * x

    graph = traced(function)
    rebuilt = Rebuild()
    (argument,) = graph.find_nodes(op="placeholder")
    rebuilt.placeholder(argument, "given")
    rebuilt.copy_with_inputs(result(graph))
    copy = rebuilt.finish(rebuilt.new(result(graph)))
    assert not {*copy.nodes} & {*graph.nodes}
    x = torch.randn(4, 6)
    assert torch.equal(fx.GraphModule({}, copy)(x), function(x))
    assert torch.equal(fx.GraphModule({}, copy_of(graph))(x), function(x))
