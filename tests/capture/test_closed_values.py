"""Values that depend on nothing, in graphs whose other values lie on another device; `meta` stands for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from harmonica_rt.capture.closed_values import compute, fold_closed_values
from harmonica_rt.graph.facts import device_of

aten = torch.ops.aten
OTHER = torch.device("meta")
NUMBER = torch.tensor(-torch.inf)
TABLE = torch.arange(6.0)


def placeholder(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.map_arg(args, lambda used: used.meta["val"]), **kwargs)
    return node


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node], device: torch.device = OTHER, **constants: Any) -> fx.Graph:
    graph = fx.Graph()
    x = placeholder(graph, "x", torch.empty(2, 6, device=device))
    for name, value in constants.items():
        placeholder(graph, name, value)
    graph.output((build(graph, x),))
    return graph


def table_moved(graph: fx.Graph, x: fx.Node) -> fx.Node:
    table = call(graph, aten.sin.default, call(graph, aten.arange.default, 6, dtype=torch.float32, device="cpu"))
    moved = call(graph, aten.to.device, table, device_of(x), torch.float32)
    return call(graph, aten.mul.Tensor, call(graph, aten.add.Tensor, x, moved), moved)


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_a_table_is_computed_once_and_moved() -> None:
    graph = graph_of(table_moved)
    (sin,) = graph.find_nodes(op="call_function", target=aten.sin.default)
    assert torch.equal(compute(sin, {}, {}), TABLE.sin())
    ((name, constant),) = fold_closed_values(graph, {}).items()
    assert constant.device == OTHER
    assert constant.shape == (6,)
    assert [node.name for node in graph.find_nodes(op="placeholder")] == ["x", name]
    assert targets(graph) == ["aten.add.Tensor", "aten.mul.Tensor"]
    graph.lint()


def test_a_number_stays_on_the_cpu() -> None:
    def fill(graph: fx.Graph, x: fx.Node) -> fx.Node:
        number = call(graph, aten.lift_fresh_copy.default, graph.find_nodes(op="placeholder")[1])
        return call(graph, aten.fill.Tensor, x, number)

    graph = graph_of(fill, number=NUMBER)
    ((name, constant),) = fold_closed_values(graph, {"number": NUMBER}).items()
    assert name != "number"
    assert torch.equal(constant, NUMBER)
    assert targets(graph) == ["aten.fill.Tensor"]


def test_indices_are_moved() -> None:
    def index(graph: fx.Graph, x: fx.Node) -> fx.Node:
        rows = call(graph, aten.arange.default, 2, device="cpu")
        node = graph.call_function(aten.index.Tensor, (x, [rows]))
        node.meta["val"] = x.meta["val"]
        return node

    graph = graph_of(index)
    (constant,) = fold_closed_values(graph, {}).values()
    assert constant.device == OTHER
    assert targets(graph) == ["aten.index.Tensor"]


def random_moved(graph: fx.Graph, x: fx.Node) -> fx.Node:
    noise = call(graph, aten.rand.default, [6], device="cpu")
    return call(graph, aten.add.Tensor, x, call(graph, aten.to.device, noise, device_of(x), torch.float32))


def held_moved(graph: fx.Graph, x: fx.Node) -> fx.Node:
    held = graph.find_nodes(op="placeholder")[1]
    return call(graph, aten.add.Tensor, x, call(graph, aten.to.device, held, device_of(x), torch.float32))


def large_moved(graph: fx.Graph, x: fx.Node) -> fx.Node:
    table = call(graph, aten.zeros.default, [2**19, 2, 6], device="cpu")
    return call(graph, aten.add.Tensor, x, call(graph, aten.to.device, table, device_of(x), torch.float32))


@pytest.mark.parametrize("build", [random_moved, held_moved, large_moved])
def test_what_may_change_and_what_is_large_stays(build: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    constants = {"held": TABLE} if build is held_moved else {}
    graph = graph_of(build, **constants)
    before = targets(graph)
    assert fold_closed_values(graph, constants) == constants
    assert targets(graph) == before


def test_a_model_on_the_cpu_stays_as_it_is() -> None:
    graph = graph_of(table_moved, device=torch.device("cpu"))
    before = targets(graph)
    assert fold_closed_values(graph, {}) == {}
    assert targets(graph) == before
