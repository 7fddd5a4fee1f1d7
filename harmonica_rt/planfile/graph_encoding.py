"""Encodes a captured graph as JSON values, without parameters.

The record holds the operators by their registered names, their arguments, what each placeholder stands for, and the
layouts of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.errors import PlanFileError
from harmonica_rt.graph.layout_inference import Layout, layouts_of
from harmonica_rt.planfile.constants import encode_constant
from harmonica_rt.planfile.model_facts import ModelFacts
from harmonica_rt.planfile.operators import name_of
from harmonica_rt.planfile.trees import encode_tree
from harmonica_rt.planfile.values import encode_layout, encode_value


def encode_graph(captured: CapturedGraph, facts: ModelFacts) -> dict[str, Any]:
    """The graph as plain JSON values.

    Constants that are plain tensors of the model are saved by name, all other constants by value.

    Raises:
        PlanFileError: it holds something that cannot be saved: a nested graph, an operator that is not on the
            allow-list, a large constant, or values of the request that the model reads.
    """
    if captured.request_values is not None:
        raise PlanFileError(
            "the model reads values of its request (such as the length of a prompt), and this plan holds for one "
            "request's values only, so it cannot be saved"
        )
    numbers: dict[fx.Node, int] = {}
    nodes = []
    for node in captured.graph.nodes:
        if node.op == "output" or (node.op == "placeholder" and not node.users):
            continue
        nodes.append(_encode_node(node, captured, facts, numbers))
        numbers[node] = len(numbers)
    results: Any = captured.output.args[0]
    return {
        "nodes": nodes,
        "outputs": [encode_value(result, facts.devices, numbers) for result in results],
        "out_spec": encode_tree(captured.out_spec),
        "site_outputs": [[numbers[node] for node in outputs] for outputs in captured.site_outputs],
    }


def _encode_node(
    node: fx.Node, captured: CapturedGraph, facts: ModelFacts, numbers: Mapping[fx.Node, int]
) -> dict[str, Any]:
    if node.op not in ("placeholder", "call_function"):
        raise PlanFileError(f"{node.name}: a graph with nested graphs ({node.op}) cannot be saved")
    try:
        layouts = layouts_of(node.meta.get("val"))
    except PlanFileError as error:
        raise PlanFileError(f"{node.name}: {error}") from error
    value = (
        encode_layout(layouts, facts.devices)
        if isinstance(layouts, Layout)
        else [encode_layout(layout, facts.devices) for layout in layouts]
    )
    if node.op == "placeholder":
        return {**_encode_placeholder(node, captured, facts), "value": value}
    entry: dict[str, Any] = {"call": name_of(node)}
    entry["args"] = [encode_value(argument, facts.devices, numbers) for argument in node.args]
    if node.kwargs:
        entry["kwargs"] = {name: encode_value(item, facts.devices, numbers) for name, item in node.kwargs.items()}
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if modules:
        entry["modules"] = modules
    return {**entry, "value": value}


def _encode_placeholder(node: fx.Node, captured: CapturedGraph, facts: ModelFacts) -> dict[str, Any]:
    if node.name in captured.parameters:
        return {"weight": captured.parameters[node.name]}  # the word of the file format
    if node.name in captured.inputs:
        return {"input": captured.inputs[node.name]}
    tensor = captured.constants[node.name]
    names = [name for name, attribute in facts.attributes.items() if attribute is tensor]
    return {"constant": {"attribute": names[0]} if names else encode_constant(node.name, tensor)}
