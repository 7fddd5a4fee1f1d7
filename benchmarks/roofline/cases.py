"""The models of the latency benchmark on the meta device, and what they are captured and planned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.latency.cases import Geometry, schedules_of
from benchmarks.roofline.recorder import meta_like
from harmonica_rt import Schedule, find_sites
from harmonica_rt.call.call import Call, CallConvention
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph


@dataclass(frozen=True, eq=False)
class MetaCase:
    """A model without memory, captured.

    Attributes:
        name: model, geometry and images.
        captured: its graph.
        roles: roles of the leaves of its calls.
        schedules: the schedules that it runs under, by name.
    """

    name: str
    captured: CapturedGraph
    roles: tuple[Role, ...]
    schedules: dict[str, Schedule]


def meta_case(geometry: Geometry, images: int, steps: int, dtype: torch.dtype) -> MetaCase:
    """Capture a model of the latency benchmark for a number of images and steps, without allocating it."""
    model = on_meta(geometry.build(), dtype)
    call = call_on_meta(model, geometry.calls(model, images, 1)[0], dtype)
    captured = capture(model, call, find_sites(model))
    name = f"{geometry.title}, {images} image{'s' * (images > 1)}"
    return MetaCase(name, captured, roles(call), schedules_of(model, steps))


def on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself, with its parameters moved to the meta device and converted."""
    nn.Module.to(model, device="meta", dtype=dtype)
    model.requires_grad_(False)
    return model.eval()


def call_on_meta(model: nn.Module, arguments: Mapping[str, object], dtype: torch.dtype) -> Call:
    """The call with these arguments, its floating-point tensors converted."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    converted = torch.utils._pytree.tree_map_only(torch.Tensor, convert, dict(arguments))
    return CallConvention(model).normalise((), meta_like(converted))
