"""JSON values -> a captured graph.

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
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.capture.sites import find_site_outputs, site_columns, without_call_suffix
from harmonica_rt.errors import CaptureError, PlanFileError
from harmonica_rt.graph.layout_inference import Inference, Layout, layout_of, layouts_of
from harmonica_rt.planfile.constants import decode_constant
from harmonica_rt.planfile.json_fields import fields_of, integer_of, items_of, refused, text_of
from harmonica_rt.planfile.model_facts import ModelFacts
from harmonica_rt.planfile.operators import check_arguments, check_node, operator_of
from harmonica_rt.planfile.trees import decode_tree
from harmonica_rt.planfile.values import decode_layout, decode_value
from harmonica_rt.untrusted.text import one_line, quoted

_PLACEHOLDERS = ("weight", "constant", "input")


def decode_graph(
    record: Any, facts: ModelFacts, signature: Signature, sites: tuple[str, ...], place: str = "graph"
) -> CapturedGraph:
    """The graph that `encode_graph` encoded.

    Args:
        record: from `encode_graph`, or from a file that anyone may have written.
        facts: from `ModelFacts.of`, for the model that the graph is to run on.
        signature: the signature of its calls.
        sites: the sites of the schedule that it runs under.
        place: where the record stands in the file, for messages.

    Raises:
        PlanFileError: the record is not one that `encode_graph` writes for this model, signature and sites.
    """
    entry = fields_of(record, place, ("nodes", "outputs", "out_spec", "site_outputs"))
    decoder = _Decoder(facts, signature)
    with signature.in_its_autocast(), decoder.inference.active():
        for number, node in enumerate(items_of(entry["nodes"], f"{place}.nodes")):
            decoder.add(node, f"{place}.nodes[{number}]")
    nodes, graph = decoder.nodes, decoder.graph
    outputs = items_of(entry["outputs"], f"{place}.outputs")
    results = [_result(value, decoder, f"{place}.outputs[{i}]") for i, value in enumerate(outputs)]
    graph.output(tuple(results))
    out_spec = decode_tree(entry["out_spec"], f"{place}.out_spec")
    if out_spec.num_leaves != len(results):
        raise refused(f"{place}.outputs", f"{out_spec.num_leaves} values, as out_spec has", outputs)
    found = _site_outputs(graph, facts, sites, f"{place}.site_outputs")
    numbers = {node: number for number, node in enumerate(nodes)}
    if [[numbers[node] for node in outputs] for outputs in found] != entry["site_outputs"]:
        raise PlanFileError(f"{place}.site_outputs: not the values that leave the sites of the schedule in this graph")
    return CapturedGraph(
        graph=graph,
        root=nn.Module(),
        weights=decoder.weights,
        constants=decoder.constants,
        inputs=decoder.inputs,
        out_spec=out_spec,
        sites=sites,
        site_outputs=found,
        seconds=0.0,
    )


class _Decoder:
    """A graph under construction, with the nodes decoded so far."""

    def __init__(self, facts: ModelFacts, signature: Signature) -> None:
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.weights: dict[str, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, int] = {}
        self.inference = Inference(trial=True)
        self._facts = facts
        self._signature = signature

    def add(self, record: Any, place: str) -> None:
        """Decode one more node."""
        if isinstance(record, dict) and "call" in record:
            node = self._call(record, place)
        else:
            node = self._placeholder(record, place)
        self.nodes.append(node)

    def _placeholder(self, record: Any, place: str) -> fx.Node:
        kind = next((kind for kind in _PLACEHOLDERS if isinstance(record, dict) and kind in record), "call")
        entry = fields_of(record, place, (kind, "value"))
        said = decode_layout(entry["value"], self._facts.devices, f"{place}.value")
        node = self.graph.placeholder(f"{kind}_{len(self.nodes)}")
        if kind == "weight":
            name = text_of(entry[kind], f"{place}.weight")
            found = _own_layout(self._facts.tensors, name, f"{place}.weight")
            self.weights[node.name] = name
        elif kind == "constant":
            tensor = self._constant(entry[kind], said, f"{place}.constant")
            found = layout_of(tensor)
            self.constants[node.name] = tensor
        else:
            index = integer_of(entry[kind], f"{place}.input", most=len(self._signature.leaves) - 1)
            found = _leaf_layout(self._signature.leaves[index], said, f"{place}.input")
            if index in self.inputs.values():
                raise PlanFileError(f"{place}.input: another node stands for the argument {index} of the call")
            self.inputs[node.name] = index
        _check_same(found, said, f"{place}.value")
        node.meta["val"] = self.inference.tensor(found, place)
        return node

    def _constant(self, record: Any, layout: Layout, place: str) -> torch.Tensor:
        if isinstance(record, dict) and "attribute" in record:
            name = text_of(fields_of(record, place, ("attribute",))["attribute"], f"{place}.attribute")
            _own_layout(self._facts.attributes, name, f"{place}.attribute")
            return self._facts.attributes[name]
        return decode_constant(fields_of(record, place, ("data",))["data"], layout, place)

    def _call(self, record: Any, place: str) -> fx.Node:
        entry = fields_of(record, place, ("call", "args", "value"), ("kwargs", "modules"))
        target = operator_of(text_of(entry["call"], f"{place}.call"), f"{place}.call")
        devices = self._facts.devices
        args = tuple(
            decode_value(value, devices, f"{place}.args[{i}]", self.nodes)
            for i, value in enumerate(items_of(entry["args"], f"{place}.args"))
        )
        given = entry.get("kwargs", {})
        if not isinstance(given, dict):
            raise refused(f"{place}.kwargs", "an object", given)
        kwargs = {
            name: decode_value(value, devices, f"{place}.kwargs[{quoted(name)}]", self.nodes)
            for name, value in given.items()
        }
        check_arguments(target, args, kwargs, place)
        node = self.graph.call_function(target, args, kwargs)
        check_node(node, place)
        node.meta["val"] = self.inference.run(node, place)
        said = entry["value"]
        if isinstance(said, list):
            layouts: Any = [decode_layout(item, devices, f"{place}.value[{i}]") for i, item in enumerate(said)]
        else:
            layouts = decode_layout(said, devices, f"{place}.value")
        _check_same(layouts_of(node.meta["val"]), layouts, f"{place}.value")
        modules = items_of(entry.get("modules", []), f"{place}.modules")
        for path in modules:
            if without_call_suffix(text_of(path, f"{place}.modules")) not in self._facts.modules:
                raise refused(f"{place}.modules", "paths of modules of the model", path)
        node.meta["nn_module_stack"] = {path: (path, "") for path in modules}
        return node


def _own_layout(tensors: Mapping[str, torch.Tensor], name: str, place: str) -> Layout:
    if name not in tensors:
        raise refused(place, "the name of a tensor of the model", name)
    if is_traceable_wrapper_subclass(tensors[name]):
        raise PlanFileError(
            f"{place}: {name} is made of other tensors (quantised?): its plan cannot be saved or loaded"
        )
    return layout_of(tensors[name])


def _leaf_layout(leaf: Any, said: Layout, place: str) -> Layout:
    """The layout of a leaf; where signatures omit a stride (in dimensions of size 1), it is the file's."""
    if not isinstance(leaf, tuple):
        raise refused(place, "the index of an argument that is a tensor", leaf)
    shape, stride, dtype, device = leaf
    if said.shape == shape:
        stride = tuple(other if n == 1 else s for n, s, other in zip(shape, stride, said.stride, strict=True))
    return Layout(shape, stride, dtype, device)


def _check_same(found: Any, said: Any, place: str) -> None:
    if found != said:
        told = [one_line(", ".join(map(str, v)) if isinstance(v, list) else v) for v in (found, said)]
        raise PlanFileError(f"{place}: expected {told[0]}, got {told[1]}")


def _result(value: Any, decoder: _Decoder, place: str) -> Any:
    """An output of the model: a tensor or a plain value."""
    result = decode_value(value, decoder._facts.devices, place, decoder.nodes)
    if isinstance(result, fx.Node):
        if not isinstance(result.meta["val"], torch.Tensor):
            raise refused(place, "one tensor", value)
    elif result is not None and not isinstance(result, (bool, int, float, str)):
        raise refused(place, "a tensor or a plain value", value)
    return result


def _site_outputs(
    graph: fx.Graph, facts: ModelFacts, sites: tuple[str, ...], place: str
) -> tuple[tuple[fx.Node, ...], ...]:
    columns = site_columns(facts.model, sites)
    try:
        return find_site_outputs(graph, sites, lambda path: columns.get(without_call_suffix(path)))
    except CaptureError as error:
        raise PlanFileError(f"{place}: {error}") from error
