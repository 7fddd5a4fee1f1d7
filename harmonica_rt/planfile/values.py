"""Plain values of graphs and signatures as JSON: numbers, torch constants by name, devices, references to nodes.

A device is saved as its type alone, so that a plan moves with its model: `cuda` means the CUDA device that
holds the model's tensors when the plan is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from harmonica_rt.errors import PlanFileError
from harmonica_rt.graph.layout_inference import Layout
from harmonica_rt.planfile.json_fields import (
    LARGEST_INTEGER,
    fields_of,
    integer_of,
    integers_of,
    items_of,
    refused,
    text_of,
)


def _names_of(kind: type) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


# Values by name. Names from a file are looked up here, as looking them up in torch itself may import something.
_NAMED: dict[str, dict[str, Any]] = {
    "dtype": _names_of(torch.dtype),
    "layout": _names_of(torch.layout),
    "memory_format": _names_of(torch.memory_format),
}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class Devices:
    """The devices that a plan of one model may name.

    Args:
        tensors: the model's parameters and buffers.

    Raises:
        PlanFileError: the tensors are on several devices of one type.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._by_type = {"cpu": torch.device("cpu")}
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            if self._by_type.setdefault(device.type, device) != device:
                raise PlanFileError(
                    f"the model's tensors are on several devices ({self._by_type[device.type]}, {device}): none of its "
                    "plans can be saved or loaded"
                )

    def name_of(self, device: torch.device) -> str:
        """The name of a device in a file.

        Raises:
            PlanFileError: it is not one of the model's devices.
        """
        own = self._by_type.get(device.type)
        if own is None or (device.type != "cpu" and device != own):
            raise PlanFileError(f"the plan holds values on {device}, not a device of the model: it cannot be saved")
        return device.type

    def named(self, value: Any, where: str) -> torch.device:
        """The device of that name.

        Raises:
            PlanFileError: the value is not the name of one of the model's devices.
        """
        if not isinstance(value, str) or value not in self._by_type:
            raise refused(where, f"a device of the model ({', '.join(self._by_type)})", value)
        return self._by_type[value]


def encode_value(value: Any, devices: Devices, numbers: Mapping[fx.Node, int] | None = None) -> Any:
    """The value as JSON: plain values as they are, everything else as an object with one field that says what it is.

    Args:
        value: an argument of a node, or a leaf of a call.
        devices: the model's devices.
        numbers: the indices of the nodes that the value may refer to.

    Raises:
        PlanFileError: the value cannot be encoded.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int) and abs(value) <= LARGEST_INTEGER:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node) and numbers is not None and value in numbers:
        return {"node": numbers[value]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode_value(item, devices, numbers) for item in value]}
    if isinstance(value, torch.device):
        if value.index is None and value.type != "cpu":
            return {"current_device": value.type}
        return {"device": devices.name_of(value)}
    for kind, known in _NAMED.items():
        name = str(value).removeprefix("torch.")
        if known.get(name) is value:
            return {kind: name}
    raise PlanFileError(f"a plan that holds a {type(value).__name__} cannot be saved")


def decode_value(value: Any, devices: Devices, where: str, nodes: Sequence[fx.Node] = ()) -> Any:
    """The value that `encode_value` encoded; `nodes` are those that it may refer to.

    Raises:
        PlanFileError: the value is not in the form that `encode_value` writes.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return integer_of(value, where, least=-LARGEST_INTEGER)
    if not isinstance(value, dict) or len(value) != 1:
        raise refused(where, "a number, a string, or an object with one field", value)
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[integer_of(content, where, most=len(nodes) - 1)]
    if kind in ("list", "tuple"):
        items = [decode_value(item, devices, f"{where}[{i}]", nodes) for i, item in enumerate(items_of(content, where))]
        return items if kind == "list" else tuple(items)
    if kind == "device":
        return devices.named(content, where)
    if kind == "current_device":
        return torch.device(devices.named(content, where).type)
    if kind == "float":
        return _one_of(_FLOATS, content, where)
    return named(kind, content, where)


def named(kind: str, name: Any, where: str) -> Any:
    """The torch constant of this kind and name, such as `torch.float32` for `("dtype", "float32")`.

    Raises:
        PlanFileError: there is no such constant.
    """
    if kind not in _NAMED:
        raise refused(where, f"one of {', '.join(_NAMED)}", kind)
    return _one_of(_NAMED[kind], name, where)


def _one_of(known: Mapping[str, Any], name: Any, where: str) -> Any:
    if text_of(name, where) not in known:
        raise refused(where, f"one of {', '.join(known)}", name)
    return known[name]


def encode_layout(layout: Layout, devices: Devices) -> dict[str, Any]:
    """The layout as a JSON object."""
    return {
        "shape": list(layout.shape),
        "stride": list(layout.stride),
        "dtype": str(layout.dtype).removeprefix("torch."),
        "device": devices.name_of(layout.device),
    }


def decode_layout(value: Any, devices: Devices, where: str) -> Layout:
    """The layout that `encode_layout` encoded.

    Raises:
        PlanFileError: the value is not in the form that `encode_layout` writes.
    """
    entry = fields_of(value, where, ("shape", "stride", "dtype", "device"))
    shape = integers_of(entry["shape"], f"{where}.shape")
    stride = integers_of(entry["stride"], f"{where}.stride")
    if len(shape) != len(stride):
        raise refused(f"{where}.stride", f"{len(shape)} numbers", entry["stride"])
    dtype = named("dtype", entry["dtype"], f"{where}.dtype")
    return Layout(shape, stride, dtype, devices.named(entry["device"], f"{where}.device"))
