"""What is measured: a model at one batch with the calls of one run, and the schedules that it runs under.

Every provider gets its own module tree over the same parameters. Hooks and patches of one are therefore invisible to
the others, and all can take turns.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks import models
from harmonica_rt import Schedule, find_sites, model_info
from harmonica_rt.call.call import Call, CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.demo import bundled_model
from harmonica_rt.plan.plan import Plan, build_plan

RELEASED = "dit-xl-2-256-ddim20-l2c"


@dataclass(frozen=True)
class Geometry:
    """A model by name.

    Attributes:
        title: name to print.
        build: builds the model; on the meta device if its parameters are to be random.
        calls: keyword arguments of each step's call, for the model, a number of images and a number of steps; guidance
            is included.
    """

    title: str
    build: Callable[[], nn.Module]
    calls: Callable[[nn.Module, int, int], list[dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its batch, and the calls of one run, one per step.

    Attributes:
        name: model, geometry and images.
        model: the model, which stays unchanged; `tree` makes a module tree to work with.
        calls: keyword arguments of each step's call, on the model's device.
        images: images per run.
    """

    name: str
    model: nn.Module
    calls: list[dict[str, Any]]
    images: int

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.model.parameters()).dtype

    @property
    def steps(self) -> int:
        """Steps per run."""
        return len(self.calls)

    def tree(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new module tree over the same parameters and buffers; with `dtype`, over converted copies of them."""
        memo: dict[int, torch.Tensor] = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            memo[id(tensor)] = tensor if dtype is None else _converted(tensor, dtype)
        return copy.deepcopy(self.model, memo)

    @contextmanager
    def in_precision(self, dtype: torch.dtype) -> Iterator[None]:
        """A context in which the parameters themselves are in a higher precision, which needs no second copy."""
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()]
        before = [tensor.dtype for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(dtype)
            yield
        finally:
            for tensor, own in zip(tensors, before, strict=True):
                tensor.data = tensor.data.to(own)  # exact: the values came from this precision

    def call(self) -> Call:
        """The first call, normalised."""
        return CallConvention(self.model).normalise((), self.calls[0])


@dataclass(frozen=True, eq=False)
class Task:
    """A case under a schedule.

    Attributes:
        case: the case.
        schedule_name: name to print.
        schedule: the schedule.
        peer_mask: step mask for a peer to follow, True for a step that it computes; None if the peer is to choose.
    """

    case: Case
    schedule_name: str
    schedule: Schedule
    peer_mask: tuple[bool, ...] | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan, from which FLOPs are taken."""
        captured = capture(self.case.model, self.case.call(), self.schedule.sites)
        return build_plan(captured, self.schedule)

    @property
    def theory(self) -> float:
        """Theoretical speed-up: FLOPs of an uncached run / FLOPs that the schedule leaves."""
        return self.plan.theoretical_speedup


def geometries(flux_blocks: tuple[int, int] = (19, 38)) -> dict[str, Geometry]:
    """Every model by name; `flux_blocks` are Flux's numbers of double-stream and of single-stream blocks."""
    double, single = flux_blocks

    def of_dit(title: str, layers: int, heads: int, head_dim: int, pixels: int) -> Geometry:
        return Geometry(title, lambda: models.dit_on_meta(layers, heads, head_dim, pixels // 8), _guided_dit)

    def of_pixart(title: str, pixels: int, text_tokens: int, *, sized: bool = False) -> Geometry:
        return Geometry(
            title,
            lambda: models.pixart_on_meta(pixels // 8, sized=sized),
            lambda model, images, steps: models.pixart_calls(model, 2 * images, steps, text_tokens),
        )

    return {
        "bundled": Geometry("bundled model", lambda: models.bundled(1, 1).model, _guided_dit),
        "dit-12x384": of_dit("DiT 12x384 256", 12, 6, 64, 256),
        "dit-xl-256": of_dit("DiT-XL/2 256", 28, 16, 72, 256),
        "dit-xl-512": of_dit("DiT-XL/2 512", 28, 16, 72, 512),
        "pixart-256": of_pixart("PixArt-alpha 256", 256, 120),
        "pixart-512": of_pixart("PixArt-alpha 512", 512, 120),
        "pixart-1024": of_pixart("PixArt-alpha 1024", 1024, 120, sized=True),
        "pixart-sigma-2048": of_pixart("PixArt-Sigma 2048", 2048, 300),
        "flux-small": Geometry(
            "small Flux (3 + 6 blocks, width 384), 256 tokens",
            models.flux_small_on_meta,
            lambda model, images, steps: models.flux_calls(model, images, steps, side=16, text_tokens=64),
        ),
        "flux-1024": Geometry(
            f"Flux-dev-like 1024 ({double} + {single} blocks)",
            lambda: models.flux_on_meta(double, single),
            lambda model, images, steps: models.flux_calls(model, images, steps, side=64, text_tokens=512),
        ),
    }


def case_of(geometry: Geometry, images: int, steps: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Build a model on a device, and make the calls of one run."""
    model = geometry.build()
    if next(model.parameters()).is_meta:
        model = models.randomised(model, device, dtype)
    else:
        nn.Module.to(model, device=device, dtype=dtype)
    model.requires_grad_(False)
    calls = along_one_path(geometry.calls(model, images, steps))
    return Case(f"{geometry.title}, {images} image{'s' * (images > 1)}", model, _moved(calls, device, dtype), images)


def schedules_of(model: nn.Module, steps: int) -> dict[str, Schedule]:
    """every(2), and the released and the learned schedule if they fit this model and number of steps."""
    sites = find_sites(model)
    found = {"every(2)": Schedule.every(2, steps=steps, sites=sites)}
    released, learned = Schedule.known(RELEASED), Schedule.load(bundled_model() / "schedule.json")
    if (list(released.sites), released.steps) == (sites, steps):
        found["released"] = released
    if (learned.model, learned.steps) == (model_info(model), steps):
        found["learned"] = learned
    return {name: replace(schedule, model=None, sampler=None) for name, schedule in found.items()}


def along_one_path(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with latents on a path from noise to one image, since caches decide by how latents change."""
    noise, picture = calls[0]["hidden_states"], calls[-1]["hidden_states"]
    angles = [math.pi / 2 * (1 - step / len(calls)) for step in range(len(calls))]
    return [
        {**call, "hidden_states": math.sin(angle) * noise + math.cos(angle) * picture}
        for call, angle in zip(calls, angles, strict=True)
    ]


def _guided_dit(model: nn.Module, images: int, steps: int) -> list[dict[str, Any]]:
    return models.dit_calls(model, 2 * images, steps)


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _moved(calls: Any, device: torch.device, dtype: torch.dtype) -> Any:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    moved: dict[int, torch.Tensor] = {}  # a tensor that all steps share stays one tensor
    return pytree.tree_map_only(torch.Tensor, lambda t: moved.setdefault(id(t), move(t)), calls)
