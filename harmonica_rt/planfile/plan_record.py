"""A plan as JSON: its graph, the signature it is for, and the offsets of its slots. Parameters stay with the model.

What follows from the graph and the schedule (step graphs, lifetimes, slot sizes) is left out and computed again. What
follows from the model (the order of arguments, their roles) is compared with the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call, CallConvention, PlainValue, Signature
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.errors import InvariantError, PlanFileError, SignatureError
from harmonica_rt.graph.layout_inference import Inference, Layout
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.planfile.graph_decoding import decode_graph
from harmonica_rt.planfile.graph_encoding import encode_graph
from harmonica_rt.planfile.json_fields import fields_of, integers_of, items_of, refused, text_of
from harmonica_rt.planfile.model_facts import ModelFacts
from harmonica_rt.planfile.trees import decode_tree, encode_tree
from harmonica_rt.planfile.values import decode_layout, decode_value, encode_layout, encode_value
from harmonica_rt.schedule import Schedule

_AUTOCAST = {"cpu": (torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}


def encode(plan: Plan, signature: Signature, leaf_roles: tuple[Role, ...], facts: ModelFacts) -> dict[str, Any]:
    """The plan as plain JSON values.

    Raises:
        PlanFileError: the graph or the signature cannot be encoded, or the record could not be loaded again.
    """
    record = {
        "signature": {
            "tree": encode_tree(signature.spec),
            "leaves": [_encode_leaf(leaf, facts) for leaf in signature.leaves],
            "autocast": [[device, encode_value(dtype, facts.devices)] for device, dtype in signature.autocast],
        },
        "roles": [role.value for role in leaf_roles],
        "graph": encode_graph(plan.captured, facts),
        "slot_offsets": [slot.offset for slot in plan.table.slots],
    }
    try:
        decode(record, plan.schedule, facts)
    except PlanFileError as error:
        raise PlanFileError(f"this plan could not be loaded again, so it is not saved ({error})") from error
    return record


def decode(
    record: Any, schedule: Schedule, facts: ModelFacts, where: str = "plan"
) -> tuple[Plan, Signature, tuple[Role, ...]]:
    """The plan, signature and roles that `encode` encoded; the schedule is stored elsewhere.

    Args:
        record: from `encode`, or from a file that anyone may have written.
        schedule: the plan's schedule.
        facts: from `ModelFacts.of`, for the model that the plan is to run on.
        where: where the record stands in the file, for messages.

    Raises:
        PlanFileError: the record is not one that `encode` writes for this model and schedule.
    """
    entry = fields_of(record, where, ("signature", "roles", "graph", "slot_offsets"))
    call = _decode_signature(entry["signature"], facts, f"{where}.signature")
    leaf_roles = roles(call)
    if [role.value for role in leaf_roles] != entry["roles"]:
        raise refused(f"{where}.roles", str([role.value for role in leaf_roles]), entry["roles"])
    captured = decode_graph(entry["graph"], facts, call.signature, schedule.sites, f"{where}.graph")
    offsets = integers_of(entry["slot_offsets"], f"{where}.slot_offsets")
    try:
        plan = build_plan(captured, schedule, offsets=offsets)
        check_plan(plan)
    except InvariantError as error:
        raise PlanFileError(f"{where}: {error}") from error
    return plan, call.signature, leaf_roles


def _encode_leaf(leaf: Any, facts: ModelFacts) -> dict[str, Any]:
    if isinstance(leaf, PlainValue):
        return {"plain": encode_value(leaf.value, facts.devices)}
    return encode_layout(Layout(*leaf), facts.devices)


def _decode_leaf(value: Any, facts: ModelFacts, where: str) -> Any:
    if not isinstance(value, dict) or "plain" not in value:
        return tuple(decode_layout(value, facts.devices, where))
    plain = decode_value(fields_of(value, where, ("plain",))["plain"], facts.devices, where)
    if isinstance(plain, (list, tuple)):
        raise refused(where, "a plain value", value)
    return PlainValue(type(plain), plain)


def _decode_signature(value: Any, facts: ModelFacts, where: str) -> Call:
    """A call with the saved signature, normalised like any call of the model; its tensors are fake."""
    entry = fields_of(value, where, ("tree", "leaves", "autocast"))
    spec = decode_tree(entry["tree"], f"{where}.tree")
    leaves = items_of(entry["leaves"], f"{where}.leaves")
    signature = Signature(
        spec,
        tuple(_decode_leaf(leaf, facts, f"{where}.leaves[{i}]") for i, leaf in enumerate(leaves)),
        _decode_autocast(entry["autocast"], facts, f"{where}.autocast"),
    )
    if spec.num_leaves != len(leaves):
        raise refused(f"{where}.leaves", f"{spec.num_leaves} values, as the tree has", leaves)
    inference = Inference(trial=False)
    with inference.active():
        values = [
            leaf.value if isinstance(leaf, PlainValue) else inference.tensor(Layout(*leaf), f"{where}.leaves[{i}]")
            for i, leaf in enumerate(signature.leaves)
        ]
    arguments = pytree.tree_unflatten(values, spec)
    if type(arguments) is not dict:
        raise refused(f"{where}.tree", "a dict of arguments by name", entry["tree"])
    try:
        with signature.in_its_autocast():
            call = CallConvention(facts.model).normalise((), arguments)
    except SignatureError as error:
        raise PlanFileError(f"{where}: {error}") from error
    if call.signature != signature:
        raise PlanFileError(f"{where}: not a signature that a call of this model can have")
    return call


def _decode_autocast(value: Any, facts: ModelFacts, where: str) -> tuple[tuple[str, torch.dtype], ...]:
    found = []
    for i, pair in enumerate(items_of(value, where)):
        if len(items_of(pair, f"{where}[{i}]")) != 2:
            raise refused(f"{where}[{i}]", "a device and a dtype", pair)
        device = text_of(pair[0], f"{where}[{i}]")
        dtype = decode_value(pair[1], facts.devices, f"{where}[{i}]")
        if dtype not in _AUTOCAST.get(device, ()) or (device == "cuda" and not torch.cuda.is_available()):
            raise refused(f"{where}[{i}]", "a device and a dtype that autocast has here", pair)
        found.append((device, dtype))
    return tuple(found)
