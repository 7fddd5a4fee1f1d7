"""U-ViT ("All are Worth Words: A ViT Backbone for Diffusion Models", arXiv 2209.12152) for ImageNet.

Time, class and patches all become tokens, and long skip connections join the first blocks to the last. Parameters are
named as in the paper's code, so `load_state_dict` loads its checkpoints; config, saving and the call are those of
diffusers, so `DiTPipeline` accepts it as its transformer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, width]` to the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: torch.Tensor = self.proj(
            functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )
        return mixed


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, width]` to the same."""
        hidden: torch.Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return hidden


class Block(nn.Module):
    """A transformer block; with `skip`, it also takes the output of a block of the first half."""

    def __init__(self, width: int, heads: int, hidden: int, *, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """`x` and `skip`, each `[batch, tokens, width]`, to the same shape."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Patches(nn.Module):
    """Turns the patches of an image into tokens."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to `[batch, patches, width]`."""
        patches: torch.Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return patches


class UViT(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """U-ViT with class labels. The defaults are U-ViT-H/2 for 256 x 256 (latents of 32 x 32).

    Args:
        sample_size: side of the latents.
        patch_size: side of a patch, in pixels of the latents.
        in_channels: channels of the latents.
        out_channels: channels of the result.
        width: width of a token.
        depth: number of blocks, odd: a first half, one in the middle, and a second half with skips.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward layers / width.
        num_embeds_ada_norm: number of classes, by diffusers' name; one more label means no class.

    Raises:
        ValueError: `depth` is even.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 4,
        width: int = 1152,
        depth: int = 29,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        num_embeds_ada_norm: int = 1000,
    ) -> None:
        super().__init__()
        if depth % 2 == 0:
            raise ValueError(f"depth: expected an odd number of blocks, got {depth}")
        half, hidden, tokens = depth // 2, int(mlp_ratio * width), (sample_size // patch_size) ** 2
        self.patch_embed = Patches(in_channels, width, patch_size)
        self.label_emb = nn.Embedding(num_embeds_ada_norm + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + tokens, width))
        self.in_blocks = nn.ModuleList(Block(width, heads, hidden, skip=False) for _ in range(half))
        self.mid_block = Block(width, heads, hidden, skip=False)
        self.out_blocks = nn.ModuleList(Block(width, heads, hidden, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * out_channels)
        self.final_layer = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Any:
        """The predicted noise.

        Args:
            hidden_states: latents `[batch, channels, size, size]`.
            timestep: `[batch]`, 0 ... 1000.
            class_labels: `[batch]`.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            `[batch, channels, size, size]`, as `.sample` or alone in a tuple.
        """
        time = _sinusoidal(timestep, self.config.width).to(hidden_states.dtype)
        tokens = [self.label_emb(class_labels)[:, None], time[:, None], self.patch_embed(hidden_states)]
        x = torch.cat(tokens, dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        side, patch = self.config.sample_size // self.config.patch_size, self.config.patch_size
        image = x.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))
        sample = self.final_layer(image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _sinusoidal(timestep: torch.Tensor, width: int) -> torch.Tensor:
    """`[batch]` to `[batch, width]`: cosines, then sines, of frequencies that fall from 1 towards 1 / 10,000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=timestep.device))
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
