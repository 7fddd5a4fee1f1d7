"""Measures the floor of a step: a lower bound of its time, from its products and the other bytes that it must move.

Products are the matmuls, convolutions and attentions that remain in a step after everything that does not depend on the
latents is hoisted, joined where `fused` joins them. Each distinct one is timed alone, repeatedly, as the library
computes it. The other bytes are the features loaded from slots, the call's tensors and the outputs; they take the time
of a large copy of that size. Everything else could in principle be fused into the products.
The prologue is not included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from benchmarks.latency.cases import Task
from benchmarks.latency.measure import clock_of, seconds_of
from harmonica_rt.call.roles import roles
from harmonica_rt.lower import lower
from harmonica_rt.options import DEFAULT_LOWERING
from harmonica_rt.plan.step_graph import ProgramGraph

aten = torch.ops.aten
PRODUCTS = {
    aten.linear,
    aten.addmm,
    aten._addmm_activation,
    aten.mm,
    aten.bmm,
    aten.baddbmm,
    aten.matmul,
    aten.conv2d,
    aten.convolution,
    aten.scaled_dot_product_attention,
}
ROUNDS = 5  # per timing; the best one counts
CALLS = 10  # per round
COPIED_BYTES = 256 << 20

Product = tuple[Any, tuple[Any, ...]]
"""An operator, and its flattened arguments with a `Layout` in place of each tensor."""


@dataclass(frozen=True)
class Layout:
    """The properties of a tensor that determine the time of a product."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def floors(task: Task) -> list[float]:
    """The floor of each step, in seconds."""
    device = task.case.device
    programs = lower(DEFAULT_LOWERING, task.plan, roles(task.case.call())).programs
    graphs = [program.step for program in programs]
    found = {product for step in graphs for product in products(step.graph)}
    seconds = {product: _alone(product, device) for product in found}
    bandwidth = copy_bandwidth(device)
    of_program = [
        sum(seconds[product] for product in products(step.graph)) + other_bytes(step) / bandwidth for step in graphs
    ]
    return [of_program[step.program] for step in task.plan.steps]


def products(graph: fx.Graph) -> list[Product]:
    """The products of a step graph, each as often as it occurs."""
    return [
        (node.target, _described(node))
        for node in graph.nodes
        if node.op == "call_function" and getattr(node.target, "overloadpacket", None) in PRODUCTS
    ]


def other_bytes(step: ProgramGraph) -> int:
    """Bytes of the features that a step loads from slots, of the call's tensors and of the outputs."""
    placeholders = [node for node in step.graph.nodes if node.op == "placeholder"]
    before = len(step.parameters) + len(step.constants)
    inputs = placeholders[before : before + len(step.inputs)]
    results: Any = step.graph.output_node().args[0]
    outputs = [node for node in results[0] if isinstance(node, fx.Node)]
    return sum(_bytes(node) for node in (*inputs, *step.read_nodes, *outputs))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _best(lambda: target.copy_(source), device)


def _described(node: fx.Node) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return (spec, tuple(_value(leaf) for leaf in leaves))


def _value(leaf: Any) -> Any:
    if not isinstance(leaf, fx.Node):
        return leaf
    fake = leaf.meta["val"]
    return Layout(tuple(fake.shape), tuple(fake.stride()), fake.dtype) if isinstance(fake, Tensor) else fake


def _alone(product: Product, device: torch.device) -> float:
    """Best seconds of a product, with random tensors of its layouts."""
    target, (spec, described) = product
    leaves = [_tensor(leaf, device) if isinstance(leaf, Layout) else leaf for leaf in described]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return _best(functools.partial(target, *args, **kwargs), device)


def _tensor(layout: Layout, device: torch.device) -> Tensor:
    tensor = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=device)
    return tensor.normal_() if layout.dtype.is_floating_point else tensor.zero_()


@torch.no_grad()
def _best(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from the best of several rounds."""
    round_ = _recorded(function, device) if device.type == "cuda" else lambda: _repeat(function)
    clock = clock_of(device)
    return min(seconds_of(round_, clock) for _ in range(ROUNDS)) / CALLS


def _repeat(function: Callable[[], object]) -> None:
    for _ in range(CALLS):
        function()


def _recorded(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A round as one CUDA graph, so that launches are not timed."""
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        _repeat(function)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        _repeat(function)
    graph.replay()
    return graph.replay


def _bytes(node: fx.Node) -> int:
    values: Iterable[Any] = pytree.tree_leaves(node.meta.get("val"))
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
