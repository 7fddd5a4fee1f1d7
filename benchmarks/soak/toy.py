"""A small transformer whose forward reads every kind of Python state that a model may hold.

Shapes: B images, N tokens, L prompt tokens, D = `WIDTH`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 8
BRIGHTNESS = 1.0  # a global that the forward reads by name


def soften(x: torch.Tensor, by: float = 0.9) -> torch.Tensor:
    """Scale `x`: called by name from another function, with a default argument."""
    return x * by


def blend(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Add `x` and the softened `y`: called by name from the forward."""
    return x + soften(y)


def shifted(amount: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that adds `amount[0]`: a closure over a list whose contents may change."""
    return lambda x: x + amount[0]


class Inner:
    """An object held by another object."""

    def __init__(self) -> None:
        self.bias = 0.1
        self.steps = [{"scale": 1.0}]

    def tone(self, x: torch.Tensor) -> torch.Tensor:
        """Scale and shift `x`: a method of a class that is not a module."""
        return x * self.steps[0]["scale"] + self.bias


class Helper:
    """An object that is an attribute of the model."""

    def __init__(self) -> None:
        self.inner = Inner()


class Processor:
    """Computes the attention of its module, and may be replaced."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, attn: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D], `context` [B, L, D]; returns [B, N, D]."""
        query, (key, value) = attn.query(x), attn.pair(context).chunk(2, dim=-1)
        return attn.out(F.scaled_dot_product_attention(query, key, value) * self.scale)


class Attention(nn.Module):
    """Attention over tokens and prompt; a site."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.processor: Any = Processor()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """See `Processor`."""
        result: torch.Tensor = self.processor(self, x, context)
        return result


class Mlp(nn.Module):
    """A feed-forward layer; a site."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        result: torch.Tensor = self.second(F.gelu(self.first(x)))
        return result


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream with a scale made from the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = Attention(), Mlp()

    def forward(self, x: torch.Tensor, prompt: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D], `prompt` [B, L, D], `scale` [B, 1, D]."""
        x = x + scale * self.attn(self.norm1(x), torch.cat([x, prompt], dim=1))
        return x + scale * self.mlp(self.norm2(x))


class Toy(nn.Module):
    """A denoiser that takes its prompt under one of several names, some of which the package knows as conditioning."""

    damping = 0.5  # read from the class

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.gain = 1.0
        self.options: dict[str, Any] = {"mix": {"alpha": 1.0}, "list": [0.5, 1.0], "activation": F.silu}
        self.options["offset"] = torch.linspace(-0.1, 0.1, WIDTH)
        self.helper = Helper()
        self.shift, self.warp = shifted([0.05]), shifted([0.02])
        self.offset = torch.linspace(0.0, 0.2, WIDTH)
        self.register_buffer("table", torch.linspace(0.9, 1.1, WIDTH))

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        cap_feats: torch.Tensor | None = None,
        extras: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [B, N, D], `timestep` [B], the prompt [B, L, D]; returns [B, N, D]."""
        given = (encoder_hidden_states, cap_feats, extras["tokens"] if extras is not None else None)
        prompt = next(one for one in given if one is not None)
        angle = timestep.to(hidden_states.dtype)[:, None] * 0.01
        scale = self.options["activation"](self.embed(torch.cat([angle.sin(), angle.cos()], dim=1)))[:, None]
        x = hidden_states * self.gain * self.options["mix"]["alpha"] + self.offset + self.options["offset"]
        x = self.helper.inner.tone(x) * self.table
        for block in self.blocks:
            x = block(x, prompt, scale)
        x = blend(x * self.options["list"][1], hidden_states * type(self).damping)
        return self.warp(self.shift(x)) * BRIGHTNESS


PROMPT_NAMES = ("encoder_hidden_states", "cap_feats", "extras")


def toy(seed: int) -> Toy:
    """A `Toy` in eval mode with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    model = Toy().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model
