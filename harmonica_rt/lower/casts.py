"""Recognises casts around the fused operators, and says which dtypes those operators take and compute in."""

from __future__ import annotations

import torch
from torch import fx

from harmonica_rt.graph.facts import value_of

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # those that the fused operators take
CASTS = (aten.to, aten._to_copy, aten.type_as)


def is_cast(node: fx.Node) -> bool:
    """Whether `node` only converts a tensor to another dtype or device."""
    return getattr(node.target, "overloadpacket", None) in CASTS


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the fused operators compute in for arguments of `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def unwidened(node: fx.Node) -> fx.Node:
    """The input of a cast that keeps the dtype or widens it to the one computed in; for any other node, itself."""
    if is_cast(node):
        (source,) = node.all_input_nodes[:1]
        a, b = value_of(source), value_of(node)
        if b.device == a.device and b.dtype in (a.dtype, arithmetic(a.dtype)):
            return source
    return node


def as_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The node or what it was widened from, whichever has `dtype`; None if neither does."""
    return next((each for each in (node, unwidened(node)) if value_of(each).dtype == dtype), None)
