"""The `plain` lowering: the step graph as it is, run operator by operator; bit-exact to the reference on CPU.

A stored value is copied into its slot right where it is computed, so that its own memory can be freed at once. (Keeping
the fresh tensor instead makes every step fault in new pages, which is slower than the copy on CPU.) An output that may
be a view of a slot, an input or a weight is cloned: the caller keeps outputs, and the memory viewed is written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from harmonica_rt.lower.hoist import Prologue
from harmonica_rt.plan.plan import Plan
from harmonica_rt.plan.specialise import StepGraph


class PlainLowering:
    """The programs of a plan: its step graphs as they are."""

    def __init__(self, plan: Plan) -> None:
        self._root = plan.captured.root
        self.prologue: Prologue | None = None
        self.fusions: tuple[dict[str, int], ...] = ()
        self.reasons: dict[str, int] = {}
        self.programs = [self.program(step) for step in plan.programs]

    def program(self, step: StepGraph) -> Program:
        """See `Lowering.program`."""
        return Program(step, self._root)


class Program:
    """A step graph ready to run.

    Args:
        step: the step graph.
        root: module that its `get_attr` nodes refer to.
        direct: let linear layers write directly into their slots, instead of copying their results there.
    """

    def __init__(self, step: StepGraph, root: nn.Module, *, direct: bool = False) -> None:
        self.step = step
        graph = with_stores(step, direct=direct)
        self._run: Callable[..., tuple[Any, ...]] = fx.GraphModule(root, graph, "StepProgram").forward

    def bind(self, weights: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """The weights and constants this program takes, in its order; valid until one of them is replaced."""
        step = self.step
        return (*(weights[name] for name in step.weights), *(constants[name] for name in step.constants))

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
            The flat outputs, free of aliases of slots.
        """
        return self._run(*bound, *(leaves[index] for index in self.step.inputs), *hoisted, *reads, *writes)


def with_stores(step: StepGraph, *, direct: bool) -> fx.Graph:
    """A copy of the step graph with one extra placeholder per store, into which the value is copied once computed."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in step.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    slots = {node: graph.placeholder(f"store_{index}") for index, node in enumerate(step.stored_nodes)}
    for node in step.graph.nodes:
        if direct and node in slots and _can_write_to_slot(node):
            copies[node] = _linear_into(graph, node, copies, slots[node])
            continue
        if node.op in ("call_function", "get_attr"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in slots:
            _store(graph, copies[node], slots[node], node.meta["val"])
    results: list[Any] = []
    for result in step.graph.output_node().args[0][0]:  # type: ignore[index,union-attr]
        if isinstance(result, fx.Node):
            copy = copies[result]
            results.append(graph.call_function(torch.clone, (copy,)) if _may_alias_argument(result) else copy)
        else:
            results.append(result)
    graph.output(tuple(results))
    graph.lint()
    return graph


def _store(graph: fx.Graph, value: fx.Node, slot: fx.Node, layout: torch.Tensor) -> None:
    """Copy `value` into `slot`; for an expanded value, copy only the elements that exist in memory."""
    for dim, (n, stride) in enumerate(zip(layout.shape, layout.stride(), strict=True)):
        if stride == 0 and n > 1:
            slot = graph.call_function(torch.narrow, (slot, dim, 0, 1))
            value = graph.call_function(torch.narrow, (value, dim, 0, 1))
    graph.call_method("copy_", (slot, value))


def _can_write_to_slot(node: fx.Node) -> bool:
    """Whether a node is a linear layer with a bias, on contiguous rows and without a cast.

    Autocast casts the arguments of `linear`, but not those of an `out` variant.
    """
    if node.target is not torch.ops.aten.linear.default or len(node.args) < 3 or node.args[2] is None:
        return False
    rows, weight, bias = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
    value = node.meta["val"]
    if {rows.dtype, weight.dtype, bias.dtype} != {value.dtype}:
        return False
    return bool(rows.is_contiguous() and value.is_contiguous() and weight.dim() == 2)


def _linear_into(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], slot: fx.Node) -> fx.Node:
    """Add `linear` as it runs on contiguous rows, one `addmm`, but writing into the slot; return the slot."""
    rows, weight, bias = (copies[argument] for argument in node.args)  # type: ignore[index]
    flat = graph.call_method("view", (rows, -1, node.args[0].meta["val"].shape[-1]))  # type: ignore[union-attr]
    out = graph.call_method("view", (slot, -1, node.meta["val"].shape[-1]))
    graph.call_function(torch.ops.aten.addmm.out, (bias, flat, graph.call_method("t", (weight,))), {"out": out})
    return slot


def _may_alias_argument(node: fx.Node) -> bool:
    """Whether a value may share memory with a slot, an input or a weight, by the operators' schemas."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op != "call_function":
            return True
        if current not in seen and _returns_alias(current.target):
            pending.extend(current.all_input_nodes)
        seen.add(current)
    return False


def _returns_alias(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # getitem and the like: assume the worst
    if any(argument.alias_info is not None for argument in target._schema.arguments):
        return True
    # reshape, to, contiguous and other composites return their input or a copy, which their schema does not say
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))
