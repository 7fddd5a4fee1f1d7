"""Decodes a captured graph from JSON values.

Hazard: anyone may have written the file. So operators are looked up in an allow-list and their arguments checked
against their schemas; nodes get new names; placeholders are checked against the model and the signature; layouts are
inferred again and compared. Text from a file never becomes code, and no layout makes code read beyond a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harmonica_rt.call.call import Signature
from harmonica_rt.capture.capture import mark
from harmonica_rt.capture.captured_graph import CapturedGraph, CapturedModel
from harmonica_rt.capture.sites import without_call_suffix
from harmonica_rt.errors import CaptureError, PlanFileError
from harmonica_rt.graph.layout_inference import Inference, Layout, layout_of, layouts_of
from harmonica_rt.planfile.constants import decode_constant
from harmonica_rt.planfile.json_fields import fields_of, integer_of, items_of, refused, text_of
from harmonica_rt.planfile.model_facts import ModelFacts
from harmonica_rt.planfile.operators import check_arguments, check_node, operator_of
from harmonica_rt.planfile.trees import decode_tree
from harmonica_rt.planfile.values import decode_layout, decode_value
from harmonica_rt.untrusted.text import one_line, quoted

_PLACEHOLDERS = ("weight", "constant", "input")  # as files name them; a "weight" is a parameter or a buffer


def decode_graph(
    record: Any, facts: ModelFacts, signature: Signature, sites: tuple[str, ...], where: str = "graph"
) -> CapturedGraph:
    """The graph that `encode_graph` encoded.

    Args:
        record: from `encode_graph`, or from a file that anyone may have written.
        facts: from `ModelFacts.of`, for the model that the graph is to run on.
        signature: the signature of its calls.
        sites: the sites of the schedule that it runs under.
        where: where the record stands in the file, for messages.

    Raises:
        PlanFileError: the record is not one that `encode_graph` writes for this model, signature and sites.
    """
    entry = fields_of(record, where, ("nodes", "outputs", "out_spec", "site_outputs"))
    decoder = _Decoder(facts, signature)
    with signature.in_its_autocast(), decoder.inference.active():
        for number, node in enumerate(items_of(entry["nodes"], f"{where}.nodes")):
            decoder.add(node, f"{where}.nodes[{number}]")
    nodes, graph = decoder.nodes, decoder.graph
    outputs = items_of(entry["outputs"], f"{where}.outputs")
    results = [_result(value, decoder, f"{where}.outputs[{i}]") for i, value in enumerate(outputs)]
    graph.output(tuple(results))
    out_spec = decode_tree(entry["out_spec"], f"{where}.out_spec")
    if out_spec.num_leaves != len(results):
        raise refused(f"{where}.outputs", f"{out_spec.num_leaves} values, as out_spec has", outputs)
    captured = CapturedModel(
        graph=graph,
        root=nn.Module(),
        parameters=decoder.parameters,
        constants=decoder.constants,
        inputs=decoder.inputs,
        out_spec=out_spec,
        seconds=0.0,
    )
    marked = _marked(captured, facts, sites, f"{where}.site_outputs")
    numbers = {node: number for number, node in enumerate(nodes)}
    if [[numbers[node] for node in outputs] for outputs in marked.site_outputs] != entry["site_outputs"]:
        raise PlanFileError(f"{where}.site_outputs: not the outputs of the schedule's sites in this graph")
    return marked


class _Decoder:
    """A graph under construction, with the nodes decoded so far."""

    def __init__(self, facts: ModelFacts, signature: Signature) -> None:
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.parameters: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, int] = {}
        self.inference = Inference(trial=True)
        self._facts = facts
        self._signature = signature

    def add(self, record: Any, where: str) -> None:
        """Decode one more node."""
        if isinstance(record, dict) and "call" in record:
            node = self._call(record, where)
        else:
            node = self._placeholder(record, where)
        self.nodes.append(node)

    def _placeholder(self, record: Any, where: str) -> fx.Node:
        kind = next((kind for kind in _PLACEHOLDERS if isinstance(record, dict) and kind in record), "call")
        entry = fields_of(record, where, (kind, "value"))
        claimed = decode_layout(entry["value"], self._facts.devices, f"{where}.value")
        node = self.graph.placeholder(f"{kind}_{len(self.nodes)}")
        if kind == "weight":
            name = text_of(entry[kind], f"{where}.weight")
            found = _own_layout(self._facts.tensors, name, f"{where}.weight")
            self.parameters[node.name] = name
        elif kind == "constant":
            tensor = self._constant(entry[kind], claimed, f"{where}.constant")
            found = layout_of(tensor)
            self.constants[node.name] = tensor
        else:
            index = integer_of(entry[kind], f"{where}.input", most=len(self._signature.leaves) - 1)
            found = _leaf_layout(self._signature.leaves[index], claimed, f"{where}.input")
            if index in self.inputs.values():
                raise PlanFileError(f"{where}.input: another node already stands for argument {index} of the call")
            self.inputs[node.name] = index
        _check_same(found, claimed, f"{where}.value")
        node.meta["val"] = self.inference.tensor(found, where)
        return node

    def _constant(self, record: Any, layout: Layout, where: str) -> torch.Tensor:
        if isinstance(record, dict) and "attribute" in record:
            name = text_of(fields_of(record, where, ("attribute",))["attribute"], f"{where}.attribute")
            _own_layout(self._facts.attributes, name, f"{where}.attribute")
            return self._facts.attributes[name]
        return decode_constant(fields_of(record, where, ("data",))["data"], layout, where)

    def _call(self, record: Any, where: str) -> fx.Node:
        entry = fields_of(record, where, ("call", "args", "value"), ("kwargs", "modules"))
        target = operator_of(text_of(entry["call"], f"{where}.call"), f"{where}.call")
        devices = self._facts.devices
        args = tuple(
            decode_value(value, devices, f"{where}.args[{i}]", self.nodes)
            for i, value in enumerate(items_of(entry["args"], f"{where}.args"))
        )
        given = entry.get("kwargs", {})
        if not isinstance(given, dict):
            raise refused(f"{where}.kwargs", "an object", given)
        kwargs = {
            name: decode_value(value, devices, f"{where}.kwargs[{quoted(name)}]", self.nodes)
            for name, value in given.items()
        }
        check_arguments(target, args, kwargs, where)
        node = self.graph.call_function(target, args, kwargs)
        check_node(node, where)
        node.meta["val"] = self.inference.run(node, where)
        claimed = entry["value"]
        if isinstance(claimed, list):
            layouts: Any = [decode_layout(item, devices, f"{where}.value[{i}]") for i, item in enumerate(claimed)]
        else:
            layouts = decode_layout(claimed, devices, f"{where}.value")
        _check_same(layouts_of(node.meta["val"]), layouts, f"{where}.value")
        modules = items_of(entry.get("modules", []), f"{where}.modules")
        for path in modules:
            if without_call_suffix(text_of(path, f"{where}.modules")) not in self._facts.modules:
                raise refused(f"{where}.modules", "paths of modules of the model", path)
        node.meta["nn_module_stack"] = {path: (path, "") for path in modules}
        return node


def _own_layout(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> Layout:
    if name not in tensors:
        raise refused(where, "the name of a tensor of the model", name)
    if is_traceable_wrapper_subclass(tensors[name]):
        raise PlanFileError(
            f"{where}: {name} is made of other tensors (quantised?), so its plan cannot be saved or loaded"
        )
    return layout_of(tensors[name])


def _leaf_layout(leaf: Any, claimed: Layout, where: str) -> Layout:
    """The layout of a leaf; signatures omit the strides of dimensions of size 1, so those come from the file."""
    if not isinstance(leaf, tuple):
        raise refused(where, "the index of an argument that is a tensor", leaf)
    shape, stride, dtype, device = leaf
    if claimed.shape == shape:
        stride = tuple(other if n == 1 else s for n, s, other in zip(shape, stride, claimed.stride, strict=True))
    return Layout(shape, stride, dtype, device)


def _check_same(found: Any, claimed: Any, where: str) -> None:
    if found != claimed:
        expected, got = (one_line(", ".join(map(str, v)) if isinstance(v, list) else v) for v in (found, claimed))
        raise PlanFileError(f"{where}: expected {expected}, got {got}")


def _result(value: Any, decoder: _Decoder, where: str) -> Any:
    """An output of the model: a tensor or a plain value."""
    result = decode_value(value, decoder._facts.devices, where, decoder.nodes)
    if isinstance(result, fx.Node):
        if not isinstance(result.meta["val"], torch.Tensor):
            raise refused(where, "a node with one tensor", value)
    elif result is not None and not isinstance(result, (bool, int, float, str)):
        raise refused(where, "a tensor or a plain value", value)
    return result


def _marked(captured: CapturedModel, facts: ModelFacts, sites: tuple[str, ...], where: str) -> CapturedGraph:
    try:
        return mark(facts.model, captured, sites)
    except CaptureError as error:
        raise PlanFileError(f"{where}: {error}") from error
