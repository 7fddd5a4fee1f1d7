"""A captured graph as JSON, without weights.

Holds what the graph is: operators by their registered names, arguments, layouts of values. Nothing in it is code:
operators are looked up by name among those that torch knows, and only such as compute tensors and write to nothing.
"""

from __future__ import annotations

import base64
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harmonica_rt.capture.graph import CapturedGraph
from harmonica_rt.capture.layout import laid_out
from harmonica_rt.capture.trees import decode_tree, encode_tree
from harmonica_rt.errors import PlanFileError

LARGEST_CONSTANT = 2**20  # bytes; larger tensors made while tracing are no small print of a graph

_FUNCTIONS: dict[str, Callable[..., Any]] = {"operator.getitem": operator.getitem}
_FILES = ("aten.from_file", "aten.save")  # operators that reach for files
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(captured: CapturedGraph, attributes: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The graph as plain JSON values.

    Args:
        captured: the graph.
        attributes: plain tensors of the model by name. What the graph took from there is saved as that name, and all
            other constants with their values.

    Raises:
        PlanFileError: it holds something that has no such form: a nested region, a function that is no registered
            operator, a large constant, values of the request that the model reads.
    """
    if captured.reads is not None:
        raise PlanFileError(
            "the model reads values of its request (the length of a prompt, say), and this plan holds for those of "
            "one: it cannot be saved"
        )
    names = {id(tensor): name for name, tensor in attributes.items()}
    return {
        "nodes": [_encode_node(node) for node in captured.graph.nodes],
        "weights": captured.weights,
        "constants": {
            name: {"attribute": names[id(tensor)]} if id(tensor) in names else _encode_constant(name, tensor)
            for name, tensor in captured.constants.items()
        },
        "inputs": captured.inputs,
        "out_spec": encode_tree(captured.out_spec),
        "sites": list(captured.sites),
        "site_outputs": [[node.name for node in nodes] for nodes in captured.site_outputs],
    }


def decode(record: dict[str, Any], attributes: Mapping[str, torch.Tensor]) -> CapturedGraph:
    """The graph that `encode` was given; `attributes` are those of the model that it is for now.

    Raises:
        PlanFileError: an operator that this torch does not have, or none that a captured graph can hold.
        KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError: not what `encode` wrote.
    """
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    with FakeTensorMode():
        for entry in record["nodes"]:
            node = _decode_node(graph, entry, nodes)
            if "value" in entry:
                node.meta["val"] = _decode_layout(entry["value"])
            node.meta["nn_module_stack"] = {path: (path, "") for path in entry.get("modules", ())}
            nodes[entry["name"]] = node
    graph.lint()
    return CapturedGraph(
        graph=graph,
        root=nn.Module(),
        # fx gives a name of its own where the old one is a word of Python
        weights={nodes[name].name: str(weight) for name, weight in record["weights"].items()},
        constants={
            nodes[name].name: attributes[entry["attribute"]] if "attribute" in entry else _decode_constant(entry)
            for name, entry in record["constants"].items()
        },
        inputs={nodes[name].name: int(index) for name, index in record["inputs"].items()},
        out_spec=decode_tree(record["out_spec"]),
        sites=tuple(record["sites"]),
        site_outputs=tuple(tuple(nodes[name] for name in names) for names in record["site_outputs"]),
        seconds=0.0,
    )


def _encode_node(node: fx.Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        entry["target"] = _name_of(node)
    elif node.op not in ("placeholder", "output"):
        raise PlanFileError(f"{node.name}: a graph with nested regions ({node.op}) cannot be saved")
    entry["args"] = [encode_value(argument) for argument in node.args]
    if node.kwargs:
        entry["kwargs"] = {name: encode_value(value) for name, value in node.kwargs.items()}
    if "val" in node.meta:
        entry["value"] = _encode_layout(node.meta["val"])
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if modules:
        entry["modules"] = modules
    return entry


def _decode_node(graph: fx.Graph, entry: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    args = tuple(decode_value(argument, nodes) for argument in entry["args"])
    kwargs = {name: decode_value(value, nodes) for name, value in entry.get("kwargs", {}).items()}
    if entry["op"] == "call_function":
        target: Any = _function(entry["target"])
    elif entry["op"] in ("placeholder", "output"):
        target = entry["name"]
    else:
        raise ValueError(f"a node of kind {entry['op']!r}")
    return graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])


def _name_of(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    for name, function in _FUNCTIONS.items():
        if node.target is function:
            return name
    raise PlanFileError(f"{node.name}: a graph that calls {node.target} cannot be saved")


def _function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, operator_name, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), operator_name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise PlanFileError(f"this torch ({torch.__version__}) has no operator {name}")
    computes = any("Tensor" in str(result.type) for result in found._schema.returns)
    if found._schema.is_mutable or not computes or f"{namespace}.{operator_name}" in _FILES:
        raise PlanFileError(f"the operator {name} does more than to compute tensors; no captured graph holds it")
    return found


def encode_value(value: Any) -> Any:
    """Plain values as they are; everything else as an object of one entry that says what it is."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [encode_value(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode_value(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise PlanFileError(f"a graph that holds a {type(value).__name__} cannot be saved")


def decode_value(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """What `encode_value` was given.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: not what `encode_value` wrote.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind in ("list", "tuple", "slice"):
        items = [decode_value(item, nodes) for item in content]
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    return named(kind, content)


def named(kind: str, name: str) -> Any:
    """`torch.float32` of `("dtype", "float32")` and the like.

    Raises:
        ValueError: there is no such thing.
    """
    found = getattr(torch, name, None)
    if kind not in _NAMED or not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{kind} {name!r}")
    return found


def _encode_layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {
            "shape": [int(n) for n in value.shape],
            "stride": [int(n) for n in value.stride()],
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
        }
    if isinstance(value, (list, tuple)):
        return [_encode_layout(item) for item in value]
    return None


def _decode_layout(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_decode_layout(item) for item in entry]
    if entry is None:
        return None
    dtype = named("dtype", entry["dtype"])
    return torch.empty_strided(entry["shape"], entry["stride"], dtype=dtype, device=entry["device"])


def _encode_constant(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.nbytes > LARGEST_CONSTANT:
        raise PlanFileError(
            f"{name}: tracing made a constant of {tensor.nbytes} bytes; at most {LARGEST_CONSTANT} are saved"
        )
    plain = tensor.detach().cpu().contiguous()
    data = base64.b64encode(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).decode("ascii")
    return {**_encode_layout(tensor), "data": data}


def _decode_constant(entry: dict[str, Any]) -> torch.Tensor:
    dtype = named("dtype", entry["dtype"])
    data = bytearray(base64.b64decode(entry["data"], validate=True))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return laid_out(flat.view(entry["shape"]).to(entry["device"]), entry["stride"])
