"""The `plain` lowering runs a step graph as it is, operator by operator; on CPU it equals the reference bit for bit.

A stored value is copied into its slot right where it is computed, so that its own memory can be freed at once. (Keeping
the fresh tensor instead makes every step fault in new pages, which is slower than the copy on CPU.) An output that may
be a view of a slot, an input or a parameter is cloned: otherwise it would change when that memory is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from harmonica_rt.graph.facts import may_alias_argument, value_of
from harmonica_rt.graph.layout import expanded_dims
from harmonica_rt.graph.rebuild import Rebuild
from harmonica_rt.plan.step_graph import ProgramGraph


class Program:
    """A step graph ready to run.

    Args:
        step: the graph of the step, lowered as far as it will be.
        root: module that its `get_attr` nodes refer to.
        direct: let linear layers write directly into their slots, instead of copying their results there.
    """

    def __init__(self, step: ProgramGraph, root: nn.Module, *, direct: bool = False) -> None:
        self.step = step
        graph = with_stores(step, direct=direct)
        self._run: Callable[..., tuple[Any, ...]] = fx.GraphModule(root, graph, "StepProgram").forward

    def bind(self, parameters: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """See `TabledGraph.bind`."""
        return self.step.bind(parameters, constants)

    def __call__(
        self,
        bound: tuple[Any, ...],
        leaves: Sequence[Any],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        hoisted: Sequence[torch.Tensor] = (),
    ) -> tuple[Any, ...]:
        """Run one step.

        Args:
            bound: from `bind`.
            leaves: all leaves of the call.
            reads: one tensor for each of the step graph's reads.
            writes: one tensor for each of its stores; overwritten.
            hoisted: one tensor for each of its hoisted values.

        Returns:
            The flat outputs; none shares memory with a slot, an input or a parameter.
        """
        return self._run(*bound, *(leaves[index] for index in self.step.inputs), *hoisted, *reads, *writes)


def with_stores(step: ProgramGraph, *, direct: bool) -> fx.Graph:
    """A copy of the step graph with one extra placeholder per store, into which the value is copied once computed."""
    rebuilt = Rebuild()
    for node in step.argument_nodes:
        rebuilt.placeholder(node)
    slots = {node: rebuilt.graph.placeholder(f"store_{index}") for index, node in enumerate(step.stored_nodes)}
    for node in step.graph.nodes:
        if direct and node in slots and _can_write_to_slot(node):
            rebuilt[node] = _linear_into(rebuilt, node, slots[node])
            continue
        if node.op in ("call_function", "get_attr"):
            rebuilt.copy(node)
        if node in slots:
            _store(rebuilt.graph, rebuilt[node], slots[node], value_of(node))
    return rebuilt.finish(tuple(_returned(rebuilt, result) for result in step.result_nodes))


def _returned(rebuilt: Rebuild, result: Any) -> Any:
    """What the program returns for a result of the step graph: a clone if it may share memory with an argument."""
    if not isinstance(result, fx.Node):
        return result
    value = rebuilt[result]
    return rebuilt.graph.call_function(torch.clone, (value,)) if may_alias_argument(result) else value


def _store(graph: fx.Graph, value: fx.Node, slot: fx.Node, layout: torch.Tensor) -> None:
    """Copy `value` into `slot`; for an expanded value, copy only the elements that exist in memory."""
    for dim in expanded_dims(layout):
        slot = graph.call_function(torch.narrow, (slot, dim, 0, 1))
        value = graph.call_function(torch.narrow, (value, dim, 0, 1))
    graph.call_method("copy_", (slot, value))


def _can_write_to_slot(node: fx.Node) -> bool:
    """Whether a node is a linear layer with a bias, on contiguous rows and without a cast.

    Autocast casts the arguments of `linear`, but not those of an `out` variant.
    """
    if node.target is not torch.ops.aten.linear.default or len(node.args) < 3 or node.args[2] is None:
        return False
    rows, weight, bias = (value_of(argument) for argument in node.args[:3])  # type: ignore[arg-type]
    value = value_of(node)
    if {rows.dtype, weight.dtype, bias.dtype} != {value.dtype}:
        return False
    return bool(rows.is_contiguous() and value.is_contiguous() and weight.dim() == 2)


def _linear_into(rebuilt: Rebuild, node: fx.Node, slot: fx.Node) -> fx.Node:
    """Add `linear` as it runs on contiguous rows, one `addmm`, but writing into the slot; return the slot."""
    graph, (rows, weight, bias) = rebuilt.graph, rebuilt.new(node.args)
    flat = graph.call_method("view", (rows, -1, value_of(node.args[0]).shape[-1]))  # type: ignore[arg-type]
    out = graph.call_method("view", (slot, -1, value_of(node).shape[-1]))
    graph.call_function(torch.ops.aten.addmm.out, (bias, flat, graph.call_method("t", (weight,))), {"out": out})
    return slot
