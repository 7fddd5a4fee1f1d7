"""A plan as JSON: its graph, the signature it is for, and where its slots lie. Weights stay with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harmonica_rt.capture import saved as saved_graph
from harmonica_rt.capture.call import PlainValue, Signature
from harmonica_rt.capture.roles import Role
from harmonica_rt.capture.trees import decode_tree, encode_tree
from harmonica_rt.errors import PlanFileError
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.schedule import Schedule

Attributes = Mapping[str, torch.Tensor]  # plain tensors of a model by name

# what damaged files were seen to raise
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)


def encode(plan: Plan, signature: Signature, roles: tuple[Role, ...], attributes: Attributes) -> dict[str, Any]:
    """The plan as plain JSON values.

    Raises:
        PlanFileError: its graph or its signature has no such form.
    """
    return {
        "signature": {
            "tree": encode_tree(signature.spec),
            "leaves": [_encode_leaf(leaf) for leaf in signature.leaves],
            "autocast": [[device, saved_graph.encode_value(dtype)] for device, dtype in signature.autocast],
        },
        "roles": [role.value for role in roles],
        "graph": saved_graph.encode(plan.captured, attributes),
        "slot_offsets": [slot.offset for slot in plan.table.slots],
    }


def decode(
    record: dict[str, Any], schedule: Schedule, attributes: Attributes
) -> tuple[Plan, Signature, tuple[Role, ...]]:
    """What `encode` was given; the schedule is kept elsewhere.

    Raises:
        PlanFileError: not what `encode` wrote, or not for this torch.
    """
    try:
        entry = record["signature"]
        signature = Signature(
            decode_tree(entry["tree"]),
            tuple(_decode_leaf(leaf) for leaf in entry["leaves"]),
            tuple((device, saved_graph.decode_value(dtype, {})) for device, dtype in entry["autocast"]),
        )
        plan = build_plan(saved_graph.decode(record["graph"], attributes), schedule, offsets=record["slot_offsets"])
        return plan, signature, tuple(Role(role) for role in record["roles"])
    except PlanFileError:
        raise
    except _DAMAGE as error:
        raise PlanFileError(f"damaged ({type(error).__name__}: {error})") from error


def _encode_leaf(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, PlainValue):
        return {"plain": saved_graph.encode_value(leaf.value)}
    shape, stride, dtype, device = leaf
    return {
        "shape": list(shape),
        "stride": list(stride),
        "dtype": saved_graph.encode_value(dtype),
        "device": saved_graph.encode_value(device),
    }


def _decode_leaf(entry: dict[str, Any]) -> Any:
    if "plain" in entry:
        value = saved_graph.decode_value(entry["plain"], {})
        return PlainValue(type(value), value)
    dtype, device = (saved_graph.decode_value(entry[name], {}) for name in ("dtype", "device"))
    return (tuple(entry["shape"]), tuple(entry["stride"]), dtype, device)
