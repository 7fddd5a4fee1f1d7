"""A plan as JSON: its graph, the signature it is for, and the offsets of its slots. Parameters stay with the model.

Plans of one captured graph, for other numbers of steps, refer to the first of them for the graph.
What follows from the graph and the schedule (step graphs, lifetimes, slot sizes) is left out and computed again. What
follows from the model (the order of arguments, their roles) is compared with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from harmonica_rt.call.call import Call, CallConvention, PlainValue, Signature
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import InvariantError, PlanFileError, SignatureError
from harmonica_rt.graph.layout_inference import Inference, Layout
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.planfile.graph_decoding import decode_graph
from harmonica_rt.planfile.graph_encoding import encode_graph
from harmonica_rt.planfile.json_fields import fields_of, integer_of, integers_of, items_of, refused, text_of
from harmonica_rt.planfile.model_facts import ModelFacts
from harmonica_rt.planfile.trees import decode_tree, encode_tree
from harmonica_rt.planfile.values import decode_layout, decode_value, encode_layout, encode_value
from harmonica_rt.schedule import ScheduleSet

_AUTOCAST = {"cpu": (torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16)}


MOST_STEPS = 10_000  # that a file may ask to resample a schedule to


class SavedPlan(NamedTuple):
    """A plan, the signature that it is for, and the roles of the leaves of its calls."""

    plan: Plan
    signature: Signature
    roles: tuple[Role, ...]


def encode(saved: SavedPlan, facts: ModelFacts, before: Sequence[SavedPlan]) -> dict[str, Any]:
    """The plan as plain JSON values.

    Args:
        saved: the plan.
        facts: from `ModelFacts.of`, for its model.
        before: the plans before it in the file.

    Raises:
        PlanFileError: the graph or the signature cannot be encoded, or the record could not be loaded again.
    """
    plan, signature, leaf_roles = saved
    same = [number for number, other in enumerate(before) if other.plan.captured.graph is plan.captured.graph]
    record = {
        "steps": len(plan.steps),
        "signature": {
            "tree": encode_tree(signature.spec),
            "leaves": [_encode_leaf(leaf, facts) for leaf in signature.leaves],
            "autocast": [[device, encode_value(dtype, facts.devices)] for device, dtype in signature.autocast],
        },
        "roles": [role.value for role in leaf_roles],
        "graph": {"of_plan": same[0]} if same else encode_graph(plan.captured, facts),
        "slot_offsets": [slot.offset for slot in plan.table.slots],
    }
    try:
        decode(record, ScheduleSet.of(plan.schedule), facts, before)
    except PlanFileError as error:
        raise PlanFileError(f"this plan could not be loaded again, so it is not saved ({error})") from error
    return record


def decode(
    record: Any, schedules: ScheduleSet, facts: ModelFacts, before: Sequence[SavedPlan], where: str = "plan"
) -> SavedPlan:
    """What `encode` encoded; the schedules are stored elsewhere.

    Args:
        record: from `encode`, or from a file that anyone may have written.
        schedules: those that the plan's schedule is one of, or is resampled from.
        facts: from `ModelFacts.of`, for the model that the plan is to run on.
        before: the plans before it in the file.
        where: where the record stands in the file, for messages.

    Raises:
        PlanFileError: the record is not one that `encode` writes for this model and these schedules.
    """
    entry = fields_of(record, where, ("steps", "signature", "roles", "graph", "slot_offsets"))
    schedule = schedules.resample(integer_of(entry["steps"], f"{where}.steps", 1, MOST_STEPS))
    call = _decode_signature(entry["signature"], facts, f"{where}.signature")
    leaf_roles = roles(call)
    if [role.value for role in leaf_roles] != entry["roles"]:
        raise refused(f"{where}.roles", str([role.value for role in leaf_roles]), entry["roles"])
    if isinstance(entry["graph"], dict) and "of_plan" in entry["graph"]:
        captured = _graph_of(entry["graph"], call.signature, before, f"{where}.graph")
    else:
        captured = decode_graph(entry["graph"], facts, call.signature, schedule.sites, f"{where}.graph")
    offsets = integers_of(entry["slot_offsets"], f"{where}.slot_offsets")
    try:
        plan = build_plan(captured, schedule, offsets=offsets)
        check_plan(plan)
    except InvariantError as error:
        raise PlanFileError(f"{where}: {error}") from error
    return SavedPlan(plan, call.signature, leaf_roles)


def _graph_of(value: dict[str, Any], signature: Signature, before: Sequence[SavedPlan], where: str) -> CapturedGraph:
    """The graph of an earlier plan of the file, for calls of the same signature."""
    number = fields_of(value, where, ("of_plan",))["of_plan"]
    if type(number) is not int or not 0 <= number < len(before) or before[number].signature != signature:
        raise refused(f"{where}.of_plan", "the number of an earlier plan with this signature", number)
    return before[number].plan.captured


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
