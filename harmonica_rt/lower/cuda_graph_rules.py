"""Finds what keeps a step graph, or a part of the prologue, from being recorded as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from harmonica_rt.graph.facts import arguments_of, device_of
from harmonica_rt.model.training_mode import draws_numbers
from harmonica_rt.plan.step_graph import TabledGraph


@dataclass(frozen=True)
class GraphRefusal:
    """Why a step program or the prologue runs without a CUDA graph.

    Attributes:
        reason: what a graph cannot hold, or what went wrong.
        node: name of the node that causes it; None where no single node does.
        target: the operator of that node.
        stack: the source lines of the model that the node comes from, where known.
    """

    reason: str
    node: str | None = None
    target: str | None = None
    stack: str | None = None

    def __str__(self) -> str:
        return self.reason if self.node is None else f"{self.node} ({self.target}) {self.reason}"


def obstacle(step: TabledGraph, *others: torch.device) -> GraphRefusal | None:
    """The first node that a CUDA graph cannot hold, and why; None where there is none.

    A graph replays the same launches with the same addresses: nothing in it may wait for a value, have a size that
    depends on one, live on another device, or draw random numbers (a recorded generator needs to be registered).

    Args:
        step: the graph.
        others: further devices that the recording uses; the nodes alone do not show them if all lie on the CPU.
    """
    found = (device for node in step.graph.nodes if (device := device_of(node)) is not None)
    devices = list(dict.fromkeys((*others, *found)))
    for node in step.graph.nodes:
        reason = None if _is_number(node, step) else _reason(node, devices)
        if reason is not None:
            return GraphRefusal(reason, node.name, str(node.target), node.meta.get("stack_trace"))
    return None


def _reason(node: fx.Node, devices: list[torch.device]) -> str | None:
    device = device_of(node)
    if len(devices) > 1 and device is not None and device.type == "cpu":
        return "lies on the CPU, while other values do not"
    first = next((device for device in devices if device.type != "cpu"), None)
    if device is not None and device.type != "cpu" and device != first:
        return f"lies on {device}, other values on {first}: a graph holds the work of one device"
    tags: Any = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    if torch.Tag.data_dependent_output in tags:
        return "waits for a value"
    if torch.Tag.dynamic_output_shape in tags and not (_indexes_by_position(node) or _counts_classes(node)):
        return "has a size that depends on values"
    if draws_numbers(node):
        return "draws random numbers (is a dropout on?)"
    return None


def _is_number(node: fx.Node, step: TabledGraph) -> bool:
    """Whether a node is a 0-dimensional CPU constant: kernels take it as a number, read while recording."""
    value = node.meta.get("val")
    is_constant = node.op == "placeholder" and node.name in step.constants
    return is_constant and isinstance(value, torch.Tensor) and value.dim() == 0


def _indexes_by_position(node: fx.Node) -> bool:
    """Whether a node indexes without a mask: only a mask makes the result's size depend on values."""
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    return all(index is None or index.meta["val"].dtype is not torch.bool for index in indices)


def _counts_classes(node: fx.Node) -> bool:
    """Whether a node is `one_hot` with its number of classes given; without it, the largest index decides."""
    return node.target is torch.ops.aten.one_hot.default and bool(arguments_of(node)["num_classes"] != -1)
