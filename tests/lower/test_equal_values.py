"""Equal values of the prologue are computed once, and nothing else is taken for equal."""

from __future__ import annotations

import operator

import torch
from torch import fx

from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import roles
from harmonica_rt.lower.equal_values import merged
from harmonica_rt.lower.hoist import plan_prologue
from tests.lower.test_regions import bodies, dit, dit_call
from tests.models import random_schedule

aten = torch.ops.aten


def graph_of(*calls: tuple[object, tuple[object, ...]]) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of calls of one placeholder, which comes first among their arguments."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph, [graph.call_function(target, (x, *rest)) for target, rest in calls]  # type: ignore[arg-type]


def test_equal_calls_are_one_node_and_so_is_what_reads_them() -> None:
    graph, (a, b) = graph_of((aten.sum.dim_IntList, ([0],)), (aten.sum.dim_IntList, ([0],)))
    c, d = (graph.call_function(aten.chunk.default, (each, 2)) for each in (a, b))
    e, f = (graph.call_function(operator.getitem, (each, 1)) for each in (c, d))
    rebuilt = merged(graph, {a, b, c, d, e, f})
    assert all(rebuilt[one] is rebuilt[other] for one, other in ((a, b), (c, d), (e, f)))
    assert len(rebuilt.graph.nodes) == 4


def test_arguments_of_other_types_or_places_are_not_equal() -> None:
    graph, nodes = graph_of(
        (aten.add.Tensor, (1,)),
        (aten.add.Tensor, (1.0,)),
        (aten.add.Tensor, (True,)),
        (aten.mul.Tensor, (0.0,)),
        (aten.mul.Tensor, (-0.0,)),
        (aten.sum.dim_IntList, ([0],)),
        (aten.sum.dim_IntList, ([1],)),
        (aten.to.dtype, (torch.float32,)),
        (aten.to.dtype, (torch.float64,)),
    )
    rebuilt = merged(graph, set(nodes))
    assert len({rebuilt[node] for node in nodes}) == len(nodes)


def test_only_the_given_nodes_are_merged() -> None:
    graph, (a, b, c) = graph_of(*[(aten.rand_like.default, ())] * 3)
    rebuilt = merged(graph, {a, b})
    assert rebuilt[a] is rebuilt[b] is not rebuilt[c]


def test_a_model_embeds_its_timestep_once_for_all_blocks() -> None:
    counts = []
    for layers in (2, 3):
        model = dit(layers)
        plan, _ = bodies(model, dit_call(), random_schedule(model, 4))
        leaves = roles(CallConvention(model).normalise((), dit_call()))
        prologue = plan_prologue(plan.captured, plan.programs, leaves, 4)
        graphs = prologue.once.graph, prologue.each.graph
        targets = [node.target for graph in graphs for node in graph.nodes]
        counts.append((targets.count(aten.exp.default), targets.count(aten.cos.default)))
        captured = plan.captured.graph
        assert len(captured.find_nodes(op="call_function", target=aten.cos.default)) == layers + 1
        assert set(prologue.once.results) | set(prologue.each.results) >= set(prologue.names)
    assert counts == [(1, 1), (1, 1)]
