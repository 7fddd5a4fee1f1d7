"""Small modules with no diffusers in sight, each with one trait that capture or planning must cope with."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from harmonica_rt import Schedule, find_sites


class Block(nn.Module):
    """A residual block with an attention-like and a feed-forward child."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D], `scale` [B, 1, D]."""
        x = x + scale * self.attn(x)
        return x + self.mlp(x)


class Stack(nn.Module):
    """Blocks with a timestep embedding: `latents` [B, N, D], `timestep` [B]."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, D]."""
        scale = self.embed(timestep[:, None].to(latents.dtype))[:, None]
        for block in self.blocks:
            latents = block(latents, scale)
        return latents


def stack(depth: int = 3, width: int = 8, seed: int = 0) -> Stack:
    """A `Stack` in eval mode with random parameters."""
    torch.manual_seed(seed)
    return Stack(depth, width).eval()


class Attention(nn.Module):
    """Attention of two heads with projections of its own for queries, keys and values."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [B, N, D]."""
        query, key, value = (
            layer(x).view(*x.shape[:-1], 2, -1).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.to_out(attended.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return out


def attending(depth: int = 2, width: int = 16, seed: int = 0, *, bias: bool = True) -> Stack:
    """A `Stack` whose blocks attend, in eval mode with random parameters."""
    model = stack(depth, width, seed)
    for block in model.blocks:
        block.attn = Attention(width, bias=bias)
    return model.eval()


def stack_call(step: int, batch: int = 2, tokens: int = 4, width: int = 8) -> dict[str, torch.Tensor]:
    """Arguments of one call of a `Stack`, with other latents at every step."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(batch, tokens, width, generator=generator)
    return {"latents": latents, "timestep": torch.full((batch,), 1.0 - step / 100)}


def random_schedule(model: nn.Module, steps: int, seed: int = 0) -> Schedule:
    """A schedule that reuses about half of all entries."""
    sites = find_sites(model)
    mask = np.random.default_rng(seed).random((steps, len(sites))) < 0.5
    mask[0] = True
    return Schedule.from_array(mask, sites=sites)


def random_weights(schedule: Schedule, order: int, *, seed: int, per_site: bool = True) -> Schedule:
    """The schedule with random weights, as many per entry as values were computed before it, at most `order`."""
    there = np.cumsum(schedule.compute, axis=0) - schedule.compute
    if not per_site:
        there = np.where(schedule.compute, order, there).min(axis=1, keepdims=True)
    weights = np.random.default_rng(seed).normal(size=(*there.shape, order))
    weights[np.arange(order) >= there[:, :, None]] = 0.0
    return schedule.with_weights(weights if per_site else weights[:, 0])


SITES = ["blocks.*.attn", "blocks.*.mlp"]


def mixed_sites(model: nn.Module, seed: int) -> list[str]:
    """Sites of several sizes that do not overlap: each block is a part of a span, or has its sub-layers as sites."""
    generator = np.random.default_rng(seed)
    sublayers, found = find_sites(model), list[str]()
    for path, _, blocks in (site.partition("[") for site in find_sites(model, level="span")):
        count, start = int(blocks.rstrip("]").partition(":")[2]), 0
        while start < count:
            stop = int(generator.integers(start + 1, count + 1))
            if generator.random() < 0.5:
                found.append(f"{path}[{start}:{stop}]")
            else:
                inside = tuple(f"{path}.{block}." for block in range(start, stop))
                found += [site for site in sublayers if site.startswith(inside)]
            start = stop
    return found
