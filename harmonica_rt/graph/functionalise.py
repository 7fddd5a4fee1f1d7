"""Rewrites the in-place operations of a traced graph into operations that return what they would have written.

Only the nodes that view or write a mutated storage are traced again, by torch's own functionalisation. Otherwise a mask
filled in place would cost a second trace of the whole model, which takes longer than the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_batchedtensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle
from harmonica_rt.graph.facts import is_item, is_mutating
from harmonica_rt.graph.layout import same_layout


def functionalise(exported: torch.export.ExportedProgram) -> bool:
    """Replace the nodes of an exported graph that write in place, and return whether that was possible.

    If not, those nodes are still there, and the whole model has to be traced again. This happens if a nested graph
    writes, or returns several views of a written storage; if a value that is read would have another layout than in the
    trace; if the trace used `torch.vmap`, whose values have no storages; or if torch cannot functionalise the writing
    nodes alone.

    Raises:
        CaptureError: the graph writes to one of its arguments, a parameter or a buffer.
    """
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.replace_all_uses_with(node.args[0])  # it writes no values
        graph.erase_node(node)
    _, *nested = (module for module in exported.graph_module.modules() if isinstance(module, fx.GraphModule))
    if any(is_mutating(node) for module in nested for node in module.graph.nodes):
        return False
    if not any(map(is_mutating, graph.nodes)):
        return True
    if any(is_batchedtensor(value) for node in graph.nodes for value in _tensors(node)):
        return False
    written = {storage for node in graph.nodes if is_mutating(node) for storage in written_storages(node)}
    part = _WrittenPart(graph, written)
    targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs}
    for argument in part.arguments:
        detail = f"it writes to {targets.get(argument.name) or argument.target}"
        raise CaptureError(CaptureFailure(Obstacle.MUTATION, detail))
    return part.replace()


class _WrittenPart:
    """The part of a graph that views or writes the storages `written`, and the nodes outside that read values of it.

    Attributes:
        arguments: the placeholders of the graph that are written to.
    """

    def __init__(self, graph: fx.Graph, written: set[int]) -> None:
        # all these nodes in graph order, each with those of its inputs that lie in these storages
        self._order: list[tuple[fx.Node, list[fx.Node]]] = []
        self._inside: set[fx.Node] = set()
        self._written = written
        for node in graph.nodes:
            taken = [value for value in node.all_input_nodes if self._is_taken(value)]
            if taken and node.target is not torch.ops.aten.lift_fresh_copy.default:  # copies, but traced as a view
                self._order.append((node, taken))
                if self._is_view(node, taken) or is_mutating(node):
                    self._inside.add(node)
        inputs = {value: None for node, _ in self._order for value in node.all_input_nodes if node in self._inside}
        self._inputs = [value for value in inputs if value not in self._inside]
        self._reads = [(node, value) for node, taken in self._order if node not in self._inside for value in taken]
        self.arguments = [value for value in self._inputs if value.op == "placeholder" and self._touches(value)]

    def _is_taken(self, value: fx.Node) -> bool:
        """Whether a value is in this part or in a written storage. A tuple made outside is not; its items are."""
        return value in self._inside or (isinstance(value.meta.get("val"), torch.Tensor) and self._touches(value))

    def _is_view(self, node: fx.Node, taken: list[fx.Node]) -> bool:
        if is_item(node):
            return node.args[0] in self._inside
        seen = self._written & set[int]().union(*map(storages_of, taken))
        return not seen.isdisjoint(storages_of(node))

    def _touches(self, node: fx.Node) -> bool:
        return not self._written.isdisjoint(storages_of(node))

    def _can_be_replaced(self) -> bool:
        """Whether no nested graph is in this part, and no two values that it takes from outside share a storage."""
        if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in self._inside):
            return False
        made_outside = {value for _, taken in self._order for value in taken if value not in self._inside}
        storages = [storage for value in made_outside for storage in storages_of(value)]
        return len(storages) == len(set(storages))  # otherwise a write to one could change another

    def replace(self) -> bool:
        """Replace this part by operations that do not write, and return whether that was possible."""
        if not self._can_be_replaced():
            return False
        try:
            with fx.traceback.preserve_node_meta():
                retraced = make_fx(torch.func.functionalize(self._run))(*(node.meta["val"] for node in self._inputs))
        except Exception:  # of many types; a real fault is raised again when the whole model is traced
            return False
        traced, output = retraced.graph, retraced.graph.output_node()
        copies: Any = output.args[0]
        current: list[fx.Node] = [copy.args[0] for copy in copies]
        layouts = ((new.meta["val"], old.meta["val"]) for new, (_, old) in zip(current, self._reads, strict=True))
        if not all(same_layout(new, old) for new, old in layouts):
            return False
        output.args = (current,)
        traced.eliminate_dead_code()
        if traced.find_nodes(op="get_attr") or any(map(_still_writes, traced.nodes)):
            return False
        self._splice(traced, current)
        return True

    def _run(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Compute this part; return copies of the values that nodes outside read, each made when it is read."""
        values: dict[fx.Node, Any] = dict(zip(self._inputs, inputs, strict=True))
        read = []
        for node, taken in self._order:
            if node not in self._inside:
                for value in taken:
                    with fx.traceback.set_current_meta(value):
                        read.append(values[value].clone())
                continue
            with fx.traceback.set_current_meta(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                target: Any = node.target
                values[node] = target(*args, **kwargs)
        return read

    def _splice(self, traced: fx.Graph, current: list[fx.Node]) -> None:
        """Insert the traced nodes before the nodes that read them, and remove this part."""
        copied = dict(zip(traced.find_nodes(op="placeholder"), self._inputs, strict=True))
        waiting = (node for node in traced.nodes if node.op == "call_function")
        for (reader, old), new in zip(self._reads, current, strict=True):
            with reader.graph.inserting_before(reader):
                while new not in copied:
                    node = next(waiting)
                    copied[node] = reader.graph.node_copy(node, copied.__getitem__)
            reader.replace_input_with(old, copied[new])
        for node in reversed([node for node, _ in self._order if node in self._inside]):
            node.graph.erase_node(node)


def written_storages(node: fx.Node) -> Iterator[int]:
    """The storages that a mutating node writes to, identified as in `storages_of`."""
    target: Any = node.target
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, fx.Node):
                    yield from storages_of(leaf)


def _still_writes(node: fx.Node) -> bool:
    """Whether a functionalised node writes; copies back to inputs do not count, as they come after all reads."""
    written: Any = node.args[0] if node.args else None
    return is_mutating(node) and (node.target is not torch.ops.aten.copy_.default or written.op != "placeholder")


def storages_of(node: fx.Node) -> set[int]:
    """The storages of a node's values in the trace. Values under `torch.vmap` have none."""
    return {value.untyped_storage()._cdata for value in _tensors(node) if not is_batchedtensor(value)}


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
