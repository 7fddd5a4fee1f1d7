"""Divides a step graph into regions: pieces that many blocks and step programs share, so each is compiled once.

A region consists of consecutive operators of the graph, with everything that they take, parameters included, as
inputs. It ends before a harmonica operator (chains of reused residuals differ from pattern to pattern, so no region
contains one) and after each site (so that a region's contents do not depend on what the sites around it do). Names
are dropped, so two blocks that do the same work give equal regions.

Views cost nothing, so every region makes the views that it needs itself: its inputs and results are not views, and a
mere view of a result is made outside.

Requires: a step graph whose nodes carry fake tensors. Ensures: the result applies the same operators to the same
values, has the same tables, and shares nothing with the given graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._subclasses import FakeTensor

from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.graph.facts import is_item, is_view, value_of
from harmonica_rt.graph.layout import expanded_dims
from harmonica_rt.graph.rebuild import Rebuild
from harmonica_rt.lower.graph_states import BodyGraph, DividedGraph
from harmonica_rt.plan.step_graph import ProgramGraph

aten = torch.ops.aten

LEAST_WORK = 2  # operators in a region; a single one runs as it is
FREE = (aten.reshape, aten.contiguous, aten.flatten, aten.to)  # views or copies: no work to compile a region for
ATTENTION = (aten.scaled_dot_product_attention.default,)  # tagged as random for its dropout, which is off


@dataclass(frozen=True, eq=False)
class Region:
    """A piece of a step graph.

    Attributes:
        graph: placeholders, operators, and one flat tuple as output; named by position.
        inputs: a fake tensor for each placeholder.
        key: the region as text, including the layouts of its inputs; equal for equal regions.
        origin: the nodes it was cut from, for messages.
    """

    graph: fx.Graph
    inputs: tuple[torch.Tensor, ...]
    key: str
    origin: str


def sections(captured: CapturedGraph) -> dict[str, int]:
    """For each node of the captured graph, by name, the number of sites that end before it."""
    last = {nodes[-1] for nodes in captured.site_outputs if nodes}
    found: dict[str, int] = {}
    section = 0
    for node in captured.graph.nodes:
        found[node.name] = section
        section += node in last
    return found


def divide(
    step: BodyGraph, sections: Mapping[str, int], compiled: Callable[[Region], Callable[..., Sequence[torch.Tensor]]]
) -> DividedGraph:
    """The body with a call of `compiled(region)` in place of each region.

    Args:
        step: the body; it is not changed.
        sections: as the function of that name returns them.
        compiled: takes a region and returns a callable from its inputs to its results, with a `__name__`.
    """
    rebuilt = Rebuild()
    for node in step.argument_nodes:
        rebuilt.placeholder(node)
    for group in _groups(step.graph, sections):
        if sum(map(_is_work, group)) < LEAST_WORK:
            for node in group:
                rebuilt.copy_with_inputs(node)
            continue
        inputs, results = _inputs(group), _results(group)
        taken = tuple(map(rebuilt.copy_with_inputs, inputs))
        call = rebuilt.graph.call_function(compiled(_region(group, inputs, results)), taken)
        call.meta["val"] = tuple(map(value_of, results))
        for index, node in enumerate(results):
            rebuilt[node] = rebuilt.graph.call_function(operator.getitem, (call, index))
            rebuilt[node].meta = dict(node.meta)
    outputs = fx.map_arg(step.graph.output_node().args[0], rebuilt.copy_with_inputs)
    return step.become(DividedGraph, graph=rebuilt.finish(outputs))


def whole(step: ProgramGraph, graph: fx.Graph) -> Region | None:
    """All of a step graph as one region, or None where something in it cannot be compiled.

    Args:
        step: the step graph.
        graph: the same, with one extra placeholder per stored value, which the value is copied into.
    """
    nodes = [node for node in step.graph.nodes if node.op not in ("placeholder", "output")]
    if not all(map(_can_compile_within, nodes)) or not all(isinstance(node, fx.Node) for node in step.result_nodes):
        return None
    stored = step.stored_nodes
    if any(expanded_dims(value_of(node)) for node in stored):
        return None  # memory that is written must have an address for each element
    values = tuple(map(value_of, (*step.argument_nodes, *stored)))
    return Region(graph, values, str(graph), f"a step program of {len(nodes)} operators")


def operators(step: ProgramGraph) -> int:
    """Number of operators of a step graph; views do not count."""
    return sum(_is_work(node) and not is_view(node) for node in step.graph.nodes if node.op == "call_function")


def _groups(graph: fx.Graph, sections: Mapping[str, int]) -> Iterator[list[fx.Node]]:
    """All operators except views, in order, grouped into lists that may be compiled together."""
    group: list[fx.Node] = []
    section = 0
    for node in graph.nodes:
        if node.op != "call_function" or is_item(node) or is_view(node):
            continue
        here = sections.get(node.meta.get("captured_name", ""), section)
        together = here == section and _can_compile(node)
        if group and not together:
            yield group
            group = []
        section = here
        # a tuple is unpacked at once: only tensors go in and out of regions
        parts = [node, *(user for user in node.users if is_item(user))]
        if _can_compile(node):
            group += parts
        else:
            yield parts
    if group:
        yield group


def _can_compile(node: fx.Node) -> bool:
    """Whether a node is an operator on ordinary tensors whose result depends on nothing else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "harmonica":
        return False
    if torch.Tag.nondeterministic_seeded in target.tags and target not in ATTENTION:
        return False  # compiled code draws other numbers
    values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
    leaves = [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else [value])]
    return all(isinstance(leaf, FakeTensor) for leaf in leaves)  # no numbers, no subclasses with kernels of their own


def _can_compile_within(node: fx.Node) -> bool:
    """Whether a node may be part of a program compiled whole, which may call harmonica operators."""
    if node.op != "call_function":
        return False
    target = node.target
    if is_item(node) or (isinstance(target, torch._ops.OpOverload) and target.namespace == "harmonica"):
        return True
    return _can_compile(node)


def _is_work(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket not in FREE


def _inputs(group: list[fx.Node]) -> list[fx.Node]:
    """What a group takes from outside, in the order of first use."""
    inside = set(group)
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if is_view(source):
                visit(source)
            elif source not in inside:
                found[source] = None

    for node in group:
        visit(node)
    return list(found)


def _results(group: list[fx.Node]) -> list[fx.Node]:
    """The values of a group that nodes outside it take, directly or through views."""
    inside = set(group)

    def leaves(node: fx.Node) -> bool:
        return any(leaves(user) if is_view(user) else user not in inside for user in node.users)

    return [node for node in group if isinstance(node.meta["val"], torch.Tensor) and leaves(node)]


def _region(group: list[fx.Node], inputs: list[fx.Node], results: list[fx.Node]) -> Region:
    rebuilt = Rebuild()
    for index, node in enumerate(inputs):
        # without a fake tensor: Inductor might compile for that instead of its example inputs
        rebuilt[node] = rebuilt.graph.placeholder(f"input_{index}")

    def copy(node: fx.Node) -> fx.Node:
        """Copy a node, after the views that it takes, under a name that depends only on its position."""
        if node not in rebuilt:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copy)
            name = f"value_{len(rebuilt)}"
            rebuilt[node] = rebuilt.graph.create_node(node.op, node.target, args, kwargs, name=name)
        return rebuilt[node]

    for node in group:
        copy(node)
    graph = rebuilt.finish(rebuilt.new(tuple(results)))
    values = tuple(map(value_of, inputs))
    layouts = [f"{v.dtype} {tuple(v.shape)} {tuple(v.stride())} {v.device}" for v in values]
    return Region(graph, values, "\n".join((*layouts, str(graph))), _origin(group))


def _origin(group: list[fx.Node]) -> str:
    stack = group[0].meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(stack.values())), "")
    return f"{group[0].name} to {group[-1].name}" + (f" (from {module})" if module else "")
