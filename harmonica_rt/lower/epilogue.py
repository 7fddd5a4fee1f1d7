"""Computes GELU in the epilogue of the matrix product before it, where the library of the device can.

The bias is added, and GELU applied, before the product is written to memory, which saves a launch and two passes over
the widest values of a block. The library applies GELU to the sum in fp32; eager PyTorch rounds that first.

Requires: a body. `_addmm_activation` computes the tanh approximation on CUDA and the exact GELU on a CPU, where it
saves nothing. Ensures: the same values up to rounding, the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import fx

from harmonica_rt.graph.facts import value_of
from harmonica_rt.graph.match import Bound, Op, Operand, matches
from harmonica_rt.graph.rebuild import Rebuild
from harmonica_rt.lower.graph_states import BodyGraph

aten = torch.ops.aten

# The GELU that pays, by type of device. Nothing runs on `meta`, where what would run on CUDA is predicted.
APPROXIMATIONS: Mapping[str, str] = MappingProxyType({"cuda": "tanh", "meta": "tanh"})
DTYPES = (
    torch.bfloat16,
    torch.float16,
)  # in fp32 the product itself may be computed otherwise by the epilogue's kernel
LINEAR = Op((aten.linear.default,), (Operand("rows"), Operand("weight"), Operand("bias")))


def with_epilogues(body: BodyGraph, approximations: Mapping[str, str] = APPROXIMATIONS) -> BodyGraph:
    """The body with one call in place of each linear layer that only a GELU follows.

    Args:
        body: the body; it is not changed.
        approximations: the GELU that the library computes, by type of device.
    """
    products = {node: bound for node in body.graph.nodes if (bound := _product(node, body, approximations)) is not None}
    if not products:
        return body
    inner = {node.args[0] for node in products}
    rebuilt = Rebuild()
    for node in body.argument_nodes:
        rebuilt.placeholder(node)
    for node in body.graph.nodes:
        if node in products:
            rebuilt[node] = _with_gelu(rebuilt, node, products[node])
        elif node.op in ("call_function", "get_attr") and node not in inner:
            rebuilt.copy(node)
    return body.become(BodyGraph, graph=rebuilt.finish(rebuilt.new(body.graph.output_node().args[0])))


def _product(node: fx.Node, body: BodyGraph, approximations: Mapping[str, str]) -> Bound | None:
    """The operands of the linear layer whose result `node` applies GELU to; None if they do not fit the epilogue."""
    if node.target is not aten.gelu.default:
        return None
    value = value_of(node)
    gelu = Op((aten.gelu.default,), (LINEAR, approximations.get(value.device.type)))
    bound = next(matches(gelu, node), None)
    if bound is None or node.args[0] in body.stored_nodes:
        return None
    rows, weight, bias = (value_of(bound[name]) for name in ("rows", "weight", "bias"))
    if {rows.dtype, weight.dtype, bias.dtype} != {value.dtype} or value.dtype not in DTYPES:
        return None
    fits = rows.is_contiguous() and value.is_contiguous() and weight.dim() == 2 and weight.is_contiguous()
    return bound if fits and bias.dim() == 1 else None


def _with_gelu(rebuilt: Rebuild, node: fx.Node, bound: Bound) -> fx.Node:
    graph, value = rebuilt.graph, value_of(node)
    rows, weight, bias = (rebuilt[bound[name]] for name in ("rows", "weight", "bias"))
    flat = graph.call_function(aten.view.default, (rows, [-1, value_of(bound["rows"]).shape[-1]]))
    turned = graph.call_function(aten.t.default, (weight,))
    product = graph.call_function(aten._addmm_activation.default, (bias, flat, turned), {"use_gelu": True})
    shaped = graph.call_function(aten.view.default, (product, list(value.shape)))
    width = value.shape[-1]
    flat.meta["val"] = value_of(bound["rows"]).reshape(-1, value_of(bound["rows"]).shape[-1])
    turned.meta["val"] = value_of(bound["weight"]).t()
    product.meta["val"] = value.reshape(-1, width)
    for each in (flat, turned, product):
        each.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    shaped.meta = dict(node.meta)
    return shaped
