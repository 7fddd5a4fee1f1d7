"""The kernels of a function, captured as a model of one site in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.roofline.cases import on_meta
from benchmarks.roofline.kernel import Kernel
from benchmarks.roofline.programs import uncached
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture

BF16 = 2  # bytes


class Site(nn.Module):
    """A function with parameters."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.operands = nn.ParameterList(nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.operands)


class OneSite(nn.Module):
    """A model that is one site."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def forward(self, hidden_states: Tensor) -> Any:
        return self.site(hidden_states)


def kernels_of(name: str, function: Callable[..., Any], x: Tensor, *shapes: tuple[int, ...]) -> list[Kernel]:
    model = on_meta(OneSite(Site(function, *shapes)), torch.bfloat16)
    call = CallConvention(model).normalise((), {"hidden_states": x.to("meta", torch.bfloat16)})
    return uncached(name, capture(model, call, ("site",)))


def eager(function: Callable[..., Any], x: Tensor, *shapes: tuple[int, ...]) -> list[Kernel]:
    return kernels_of("eager", function, x, *shapes)


def compiled(function: Callable[..., Any], x: Tensor, *shapes: tuple[int, ...]) -> list[Kernel]:
    return kernels_of("torch.compile", function, x, *shapes)
