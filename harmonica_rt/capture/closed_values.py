"""Values that depend on nothing, computed once at capture and kept as constants on the device that uses them.

A forward may make a table on the CPU (`torch.arange(n).to(x.device)`) or a number (`torch.tensor(-torch.inf)`) in every
call. For a model on a GPU each such copy makes the host wait, and no CUDA graph can hold it. The operators are those of
the forward, on the same device, so the values are the same bit for bit. Models on the CPU are left as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from harmonica_rt.graph.facts import device_of, is_item, is_mutating

LARGEST = 2**20  # bytes of one value; a plan file holds no larger constants

CPU = torch.device("cpu")


def fold_closed_values(graph: fx.Graph, constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace values made on the CPU from constants alone, and then used on another device, by constants.

    Args:
        graph: a functional graph; it is changed.
        constants: placeholder name -> tensor. Those that `torch.tensor` made during the trace count as closed; others
            are held by the model or by its module, which may write to them.

    Returns:
        The constants of the changed graph: the given ones and those that were made.
    """
    found = dict(constants)
    if all(map(_on_cpu, graph.nodes)):
        return found
    closed = _closed(graph, constants)
    values: dict[fx.Node, Any] = {}
    made: dict[tuple[fx.Node, torch.device], fx.Node] = {}
    last_placeholder = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in closed:
        for user in [user for user in node.users if user not in closed]:
            device = _used_on(node, user)
            if device is None:
                continue
            new = made.get((node, device))
            if new is None:
                with graph.inserting_after(last_placeholder):
                    new = made[node, device] = graph.placeholder(f"{node.name}_on_{device.type}")
                new.meta["val"] = node.meta["val"].to(device)
                found[new.name] = compute(node, constants, values).to(device)
            user.replace_input_with(node, new)
    for node in reversed(closed):
        if not node.users:
            graph.erase_node(node)
            found.pop(node.name, None)
    return found


def compute(node: fx.Node, constants: Mapping[str, torch.Tensor], values: dict[fx.Node, Any]) -> Any:
    """The value of a closed node; `values` keeps those already computed."""
    if node.op == "placeholder":
        return constants[node.name]
    if node not in values:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: compute(used, constants, values))
        target: Any = node.target
        with torch.inference_mode(False), torch.no_grad():
            values[node] = target(*args, **kwargs)
    return values[node]


def _closed(graph: fx.Graph, constants: Collection[str]) -> dict[fx.Node, None]:
    """The nodes on the CPU that only constants lead to, and the copies of them on other devices, in graph order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder":
            is_closed = node.name in constants and _on_cpu(node) and all(map(_is_fresh_copy, node.users))
        else:
            is_closed = _can_fold(node) and (bool(inputs) or _on_cpu(node))
            is_closed = is_closed and all(used in found and _on_cpu(used) for used in inputs)
        if is_closed:
            found[node] = None
    return found


def _on_cpu(node: fx.Node) -> bool:
    """Whether all tensors that a node stands for, if any, lie on the CPU."""
    return all(tensor.device == CPU for tensor in _tensors(node))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]


def _is_fresh_copy(node: fx.Node) -> bool:
    """Whether a node is what `torch.tensor` is traced as."""
    return node.target is torch.ops.aten.lift_fresh_copy.default


def _can_fold(node: fx.Node) -> bool:
    if not is_item(node):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or is_mutating(node):
            return False
        if torch.Tag.nondeterministic_seeded in target.tags:
            return False
    tensors = _tensors(node)
    sizes = [size for tensor in tensors for size in tensor.shape]
    known = all(isinstance(size, int) for size in sizes)
    return bool(tensors) and known and all(tensor.nbytes <= LARGEST for tensor in tensors)


def _used_on(node: fx.Node, user: fx.Node) -> torch.device | None:
    """Where a closed value is to lie for a user that is not closed; None if it is left as it is."""
    device = device_of(node)
    if device is None or device != CPU:
        return device
    if node.op == "placeholder" or device_of(user) in (None, CPU):
        return None
    if node.meta["val"].dim() == 0:
        return CPU  # kernels take it as a number
    indexes = user.target is torch.ops.aten.index.Tensor and user.args[0] is not node
    return device_of(user) if indexes else None
