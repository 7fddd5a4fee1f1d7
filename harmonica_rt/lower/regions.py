"""Divide a step graph into regions: pieces to compile that many blocks and step programs have in common.

A region consists of consecutive operators of the graph, with everything that they take, weights included, as inputs. It
ends before a harmonica operator (chains of reused residuals differ from pattern to pattern, so no region contains one)
and after each site (so that a region's contents do not depend on what the sites around it do). Names are dropped, so
two blocks that do the same work give equal regions.

Views cost nothing, so every region makes the views that it needs itself: its inputs and results are not views, and a
mere view of a result is made outside.

Requires: a step graph whose nodes carry fake tensors. Ensures: the same operators on the same values, the same tables,
nothing shared with the given graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from harmonica_rt.capture.capture import CapturedGraph
from harmonica_rt.plan.specialise import StepGraph, check_step_graph

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
        place: where it was cut out, for messages.
    """

    graph: fx.Graph
    inputs: tuple[torch.Tensor, ...]
    key: str
    place: str


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
    step: StepGraph, sections: Mapping[str, int], compiled: Callable[[Region], Callable[..., Sequence[torch.Tensor]]]
) -> StepGraph:
    """The step graph with a call of `compiled(region)` in place of each region.

    Args:
        step: the step graph; it is not changed.
        sections: from the function of that name.
        compiled: returns a callable for a region, which maps its inputs to its results and has a `__name__`.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        """The node's copy in the new graph; views are copied when first needed."""
        if node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in step.graph.find_nodes(op="placeholder"):
        copy(node)
    for group in _groups(step.graph, sections):
        if sum(map(_is_work, group)) < LEAST_WORK:
            for node in group:
                copy(node)
            continue
        inputs, results = _inputs(group), _results(group)
        call = graph.call_function(compiled(_region(group, inputs, results)), tuple(map(copy, inputs)))
        call.meta["val"] = tuple(node.meta["val"] for node in results)
        for index, node in enumerate(results):
            copies[node] = graph.call_function(operator.getitem, (call, index))
            copies[node].meta = dict(node.meta)
    graph.output(fx.map_arg(step.graph.output_node().args[0], copy))
    divided = replace(step, graph=graph)
    check_step_graph(divided)
    return divided


def whole(step: StepGraph, graph: fx.Graph) -> Region | None:
    """All of a step graph as one region, or None where something in it cannot be compiled.

    Args:
        step: the step graph.
        graph: the same, with one extra placeholder per stored value, which the value is copied into.
    """
    operators = [node for node in step.graph.nodes if node.op not in ("placeholder", "output")]
    outputs: Any = step.graph.output_node().args[0]
    results, stored = outputs
    if not all(map(_can_compile_within, operators)) or not all(isinstance(node, fx.Node) for node in results):
        return None
    arguments = step.graph.find_nodes(op="placeholder")
    values = tuple(node.meta["val"] for node in (*arguments, *stored))
    if any(stride == 0 and n > 1 for node in stored for n, stride in _dims(node)):
        return None  # memory that is written must have an address for each element
    return Region(graph, values, str(graph), f"a step program of {len(operators)} operators")


def operators(step: StepGraph) -> int:
    """Number of operators of a step graph; views do not count."""
    return sum(_is_work(node) and not _is_view(node) for node in step.graph.nodes if node.op == "call_function")


def _groups(graph: fx.Graph, sections: Mapping[str, int]) -> Iterator[list[fx.Node]]:
    """All operators except views, in order, grouped into lists that may be compiled together."""
    group: list[fx.Node] = []
    section = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or _is_view(node):
            continue
        here = sections.get(node.meta.get("captured_name", ""), section)
        together = here == section and _can_compile(node)
        if group and not together:
            yield group
            group = []
        section = here
        # a tuple is unpacked at once: only tensors go in and out of regions
        parts = [node, *(user for user in node.users if user.target is operator.getitem)]
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
    if target is operator.getitem or (isinstance(target, torch._ops.OpOverload) and target.namespace == "harmonica"):
        return True
    return _can_compile(node)


def _dims(node: fx.Node) -> Iterator[tuple[int, int]]:
    value = node.meta["val"]
    return zip(value.shape, value.stride(), strict=True)


def _is_view(node: fx.Node) -> bool:
    """Whether a node is a view by its operator's schema, or taken out of a list of views."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)


def _is_work(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket not in FREE


def _inputs(group: list[fx.Node]) -> list[fx.Node]:
    """What a group takes from outside, in the order of first use."""
    inside = set(group)
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if _is_view(source):
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
        return any(leaves(user) if _is_view(user) else user not in inside for user in node.users)

    return [node for node in group if isinstance(node.meta["val"], torch.Tensor) and leaves(node)]


def _region(group: list[fx.Node], inputs: list[fx.Node], results: list[fx.Node]) -> Region:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copy)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=f"value_{len(copies)}")
        return copies[node]

    for node in group:
        copy(node)
    graph.output(tuple(copies[node] for node in results))
    graph.lint()
    values = tuple(node.meta["val"] for node in inputs)
    layouts = [f"{v.dtype} {tuple(v.shape)} {tuple(v.stride())} {v.device}" for v in values]
    return Region(graph, values, "\n".join((*layouts, str(graph))), _place(group))


def _place(group: list[fx.Node]) -> str:
    stack = group[0].meta.get("nn_module_stack") or {}
    module = next((path for path, _ in reversed(stack.values())), "")
    return f"{group[0].name} to {group[-1].name}" + (f" (from {module})" if module else "")
