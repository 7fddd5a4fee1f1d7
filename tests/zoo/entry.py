"""What one line of the zoo is made of: a config, and what the model is called with, as functions of config and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils import _pytree as pytree

from harmonica_rt.errors import CaptureError, HarmonicaError, Obstacle, SignatureError


@dataclass(frozen=True)
class Size:
    """Geometry of a call: latents are `frames` x `height` x `width`, prompts `text` tokens, audio `audio` tokens."""

    batch: int
    frames: int
    height: int
    width: int
    text: int
    audio: int

    @property
    def packed(self) -> int:
        """Tokens of an image whose latents are packed two by two."""
        return self.height * self.width // 4


TINY = Size(batch=2, frames=2, height=4, width=6, text=3, audio=8)
IMAGE = Size(batch=1, frames=1, height=128, width=128, text=256, audio=0)  # 1024 x 1024 pixels
VIDEO = Size(batch=1, frames=13, height=60, width=90, text=226, audio=126)  # 49 frames of 480 x 720 pixels
SOUND = Size(batch=1, frames=1, height=1, width=1, text=128, audio=1024)


@dataclass(frozen=True)
class Draw:
    """Values of one call, made when its step and device are known."""

    make: Callable[[int, torch.Generator], torch.Tensor]
    each_step: bool = False


def latents(*shape: int) -> Draw:
    """Normal values, others in every step."""
    return Draw(lambda step, generator: torch.randn(shape, generator=generator), each_step=True)


def normal(*shape: int) -> Draw:
    """Normal values, the same in every step."""
    return Draw(lambda step, generator: torch.randn(shape, generator=generator))


def integers(high: int, *shape: int) -> Draw:
    """Whole numbers below `high`, the same in every step."""
    return Draw(lambda step, generator: torch.randint(high, shape, generator=generator))


def timestep(*shape: int) -> Draw:
    """A timestep of a thousand, falling."""
    return Draw(lambda step, generator: torch.full(shape, 950.0 - 40 * step), each_step=True)


def sigma(*shape: int) -> Draw:
    """A noise level in (0, 1], falling."""
    return Draw(lambda step, generator: torch.full(shape, 1.0 - 0.04 * step), each_step=True)


def grid(*sides: int) -> torch.Tensor:
    """Coordinates of all places of a grid in row-major order, as floats: [places, sides]."""
    return torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in sides)).reshape(-1, len(sides))


@dataclass(frozen=True)
class Failure:
    """Why a class cannot be compiled, and what would have to change for it.

    Attributes:
        message: a pattern that the error's text holds.
        why: the cause, in words.
        upstream: what diffusers or torch would need to change.
        obstacle: of a `CaptureError`; None for a `SignatureError`.
    """

    message: str
    why: str
    upstream: str
    obstacle: Obstacle | None = Obstacle.EXPORT

    @property
    def error(self) -> type[HarmonicaError]:
        """What is raised."""
        return SignatureError if self.obstacle is None else CaptureError


@dataclass(frozen=True)
class Entry:
    """One class.

    Attributes:
        config: what makes it tiny.
        inputs: keyword arguments of its call by config and size; `Draw`s and plain values.
        size: its real geometry.
        real: what its published config has other than the defaults of the class.
        failure: why it cannot be compiled; None where it can.
        no_span: why its blocks are no spans, in words; None where they are.
    """

    config: Mapping[str, Any]
    inputs: Callable[[Any, Size], dict[str, Any]]
    size: Size = IMAGE
    real: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    no_span: str | None = None


def model_of(name: str, config: Mapping[str, Any]) -> Any:
    """A model of the diffusers class `name` in eval mode, with whatever weights it begins with."""
    return getattr(diffusers, name)(**config).eval()


def calls_of(entry: Entry, model: nn.Module, size: Size, steps: int) -> list[dict[str, Any]]:
    """One call per step; the values that are the same in every step are the same tensors."""
    generator = torch.Generator().manual_seed(0)
    drawn = entry.inputs(model.config, size)
    drawn = pytree.tree_map_only(Draw, lambda value: value if value.each_step else value.make(0, generator), drawn)
    return [
        pytree.tree_map_only(Draw, lambda value, step=step: value.make(step, generator), drawn) for step in range(steps)
    ]
