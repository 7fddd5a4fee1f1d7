"""Models that only their slot memory is planned for: a narrow Flux, and Wan at its full size without memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import nn

from benchmarks.models import randomised


def wan_on_meta(layers: int = 40) -> nn.Module:
    """Wan 2.1 at the geometry of its 14B text-to-video model (width 5120), on the meta device."""
    with torch.device("meta"):
        model: nn.Module = WanTransformer3DModel(num_layers=layers)
    return model.eval()


def wan_call() -> dict[str, Any]:
    """The call of one step for 81 frames of 720 x 1280 pixels, on the meta device; 75600 tokens."""
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(1, 16, 21, 90, 160),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
        }


def flux_like() -> nn.Module:
    """Flux with 19 + 38 blocks at a narrow width: the same sites and relative sizes, at little cost."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
    return randomised(model)


def flux_call(image_tokens: int, text_tokens: int) -> dict[str, Any]:
    """Keyword arguments of one call of the Flux-like model, batch 1."""
    return {
        "hidden_states": torch.randn(1, image_tokens, 4),
        "encoder_hidden_states": torch.randn(1, text_tokens, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(image_tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": torch.tensor([3.5]),
    }
