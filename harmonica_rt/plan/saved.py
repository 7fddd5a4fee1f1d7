"""A plan as JSON: its graph, the signature it is for, and where its slots lie. Weights stay with the model."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmonica_rt.capture import saved as saved_graph
from harmonica_rt.capture.call import PlainValue, Signature
from harmonica_rt.capture.roles import Role
from harmonica_rt.errors import PlanFileError
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.schedule import Schedule

_PLAIN: dict[str, type] = {kind.__name__: kind for kind in (type(None), bool, int, float, str)}
_NAMED: dict[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format}


def encode(plan: Plan, signature: Signature, roles: tuple[Role, ...]) -> dict[str, Any]:
    """The plan as plain JSON values.

    Raises:
        PlanFileError: its graph or its signature has no such form.
    """
    return {
        "signature": {
            "spec": pytree.treespec_dumps(signature.spec),
            "leaves": [_encode_leaf(leaf) for leaf in signature.leaves],
            "autocast": [[device, _name(dtype)] for device, dtype in signature.autocast],
        },
        "roles": [role.value for role in roles],
        "graph": saved_graph.encode(plan.captured),
        "slot_offsets": [slot.offset for slot in plan.table.slots],
    }


def decode(record: dict[str, Any], schedule: Schedule) -> tuple[Plan, Signature, tuple[Role, ...]]:
    """What `encode` was given; the schedule is kept elsewhere.

    Raises:
        PlanFileError: an operator that this torch does not have.
        KeyError, TypeError, ValueError, AttributeError: not what `encode` wrote.
    """
    entry = record["signature"]
    signature = Signature(
        pytree.treespec_loads(entry["spec"]),
        tuple(_decode_leaf(leaf) for leaf in entry["leaves"]),
        tuple((device, saved_graph.named("dtype", dtype)) for device, dtype in entry["autocast"]),
    )
    plan = build_plan(saved_graph.decode(record["graph"]), schedule, offsets=record["slot_offsets"])
    return plan, signature, tuple(Role(role) for role in record["roles"])


def _encode_leaf(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, PlainValue):
        kind = next((name for name, of in {**_PLAIN, **_NAMED}.items() if leaf.type is of), None)
        if kind is None:
            raise PlanFileError(f"a plan for calls with a {leaf.type.__name__} among the arguments cannot be saved")
        return {"type": kind, "value": _name(leaf.value) if kind in _NAMED else leaf.value}
    shape, stride, dtype, device = leaf
    return {"shape": list(shape), "stride": list(stride), "dtype": _name(dtype), "device": str(device)}


def _decode_leaf(entry: dict[str, Any]) -> Any:
    if "type" in entry:
        kind, value = entry["type"], entry["value"]
        if kind in _NAMED:
            return PlainValue(_NAMED[kind], saved_graph.named(kind, value))
        return PlainValue(_PLAIN[kind], value)
    dtype = saved_graph.named("dtype", entry["dtype"])
    return (tuple(entry["shape"]), tuple(entry["stride"]), dtype, torch.device(entry["device"]))


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
