"""The models that are measured, and the calls of one run.

Parameters are random and not zero, adaLN gates included, except in the bundled model, which is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)
from torch import nn

from harmonica_rt import CompiledModel

NULL_CLASS = 1000


@dataclass(frozen=True)
class Case:
    """A denoiser and the calls of one run.

    Attributes:
        name: model, geometry and batch.
        model: the denoiser.
        calls: keyword arguments of each step's call.
    """

    name: str
    model: nn.Module
    calls: list[dict[str, Any]]

    @torch.no_grad()
    def run_uncached(self) -> None:
        """Run all steps with the model itself."""
        for call in self.calls:
            self.model(**call)

    @torch.no_grad()
    def run_compiled(self, compiled: CompiledModel) -> None:
        """Run all steps with the compiled model."""
        compiled.reset()
        for call in self.calls:
            compiled(**call)


def bundled(batch: int, steps: int) -> Case:
    """The bundled digits model, which is trained; guidance doubles the batch."""
    path = resources.files("harmonica_rt") / "demo" / "digits-dit"
    model = DiTTransformer2DModel.from_pretrained(str(path), subfolder="transformer").eval()
    return Case(f"bundled, batch {batch} (guidance: {2 * batch})", model, dit_calls(model, 2 * batch, steps))


def dit_12x384(batch: int, steps: int) -> Case:
    """A DiT of 12 blocks, width 384, 256 tokens."""
    model = dit(layers=12, heads=6, head_dim=64)
    return Case(f"DiT 12x384, 256 tokens, batch {batch}", model, dit_calls(model, batch, steps))


def dit_xl_2(batch: int, steps: int) -> Case:
    """DiT-XL/2 at 256 x 256: 28 blocks, width 1152, 256 tokens."""
    model = dit(layers=28, heads=16, head_dim=72)
    return Case(f"DiT-XL/2 256, batch {batch}", model, dit_calls(model, batch, steps))


def dit(layers: int, heads: int, head_dim: int) -> nn.Module:
    """A DiT of diffusers' class with 32 x 32 latents and patches of 2 x 2."""
    return randomised(dit_on_meta(layers, heads, head_dim, sample_size=32))


def dit_on_meta(layers: int, heads: int, head_dim: int, sample_size: int) -> nn.Module:
    """A DiT with patches of 2 x 2, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            sample_size=sample_size,
            patch_size=2,
            norm_type="ada_norm_zero",
            num_embeds_ada_norm=NULL_CLASS,
            activation_fn="gelu-approximate",
        ).eval()
    return model


def pixart_xl(batch: int, steps: int) -> Case:
    """PixArt-XL/2 at 256 x 256: 28 blocks, width 1152, 256 tokens, 120 text tokens."""
    model = randomised(pixart_on_meta(sample_size=32))
    name = f"PixArt-XL/2 256, 120 text tokens, batch {batch}"
    return Case(name, model, pixart_calls(model, batch, steps, text_tokens=120))


def pixart_on_meta(sample_size: int, *, sized: bool = False) -> nn.Module:
    """PixArt-XL/2, 28 blocks of width 1152, on the meta device; if `sized`, it takes the image size (alpha 1024)."""
    with torch.device("meta"):
        model: nn.Module = PixArtTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            cross_attention_dim=1152,
            sample_size=sample_size,
            patch_size=2,
            caption_channels=4096,
            use_additional_conditions=sized,
        ).eval()
    return model


def pixart_calls(model: nn.Module, rows: int, steps: int, text_tokens: int) -> list[dict[str, Any]]:
    """Keyword arguments of the call of each DDIM step, with a batch of `rows`."""
    config: Any = model.config
    side = config.sample_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(rows, text_tokens, config.caption_channels, generator=generator)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    sized = config.use_additional_conditions
    size = {
        "resolution": torch.full((rows, 2), 8.0 * side) if sized else None,
        "aspect_ratio": torch.ones(rows, 1) if sized else None,
    }
    return [
        {
            "hidden_states": torch.randn(rows, config.in_channels, side, side, generator=generator),
            "encoder_hidden_states": prompt,
            "encoder_attention_mask": torch.ones(rows, text_tokens),
            "timestep": torch.full((rows,), int(timestep)),
            "added_cond_kwargs": size,
        }
        for timestep in scheduler.timesteps
    ]


def flux_on_meta(double: int = 19, single: int = 38) -> nn.Module:
    """Flux at the geometry of FLUX.1-dev (width 3072, guidance embedded), on the meta device.

    Args:
        double: number of double-stream blocks.
        single: number of single-stream blocks.
    """
    with torch.device("meta"):
        model: nn.Module = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    return model.eval()


def flux_small_on_meta() -> nn.Module:
    """Flux with an eighth of its width and few blocks, on the meta device; small enough to run on a CPU."""
    with torch.device("meta"):
        model: nn.Module = FluxTransformer2DModel(
            num_layers=3,
            num_single_layers=6,
            num_attention_heads=6,
            attention_head_dim=64,
            joint_attention_dim=512,
            pooled_projection_dim=256,
            axes_dims_rope=(8, 28, 28),
            guidance_embeds=True,
        )
    return model.eval()


def flux_calls(model: nn.Module, rows: int, steps: int, *, side: int, text_tokens: int) -> list[dict[str, Any]]:
    """Keyword arguments of the call of each step of flow matching, with `side` x `side` image tokens."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    place = torch.zeros(side, side, 3)
    place[..., 1], place[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None, :]
    request = {
        "encoder_hidden_states": torch.randn(rows, text_tokens, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(rows, config.pooled_projection_dim, generator=generator),
        "img_ids": place.reshape(side * side, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": torch.full((rows,), 3.5),
    }
    return [
        {
            "hidden_states": torch.randn(rows, side * side, config.in_channels, generator=generator),
            "timestep": torch.full((rows,), float(sigma)),
            **request,
        }
        for sigma in torch.linspace(1, 1 / steps, steps)
    ]


def randomised(model: nn.Module, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Materialise a meta model with normal parameters and buffers (deviation 0.02); `dtype` None keeps its dtype."""
    if dtype is not None:
        nn.Module.to(model, dtype=dtype)  # before it is materialised: this costs no memory
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02, generator=generator)
    return model


def dit_calls(model: nn.Module, rows: int, steps: int) -> list[dict[str, Any]]:
    """Keyword arguments of the call of each DDIM step, with a batch of `rows`."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    classes = torch.arange(rows) % 10
    return [
        {
            "hidden_states": torch.randn(
                rows, config.in_channels, config.sample_size, config.sample_size, generator=generator
            ),
            "timestep": torch.full((rows,), int(timestep)),
            "class_labels": classes,
        }
        for timestep in scheduler.timesteps
    ]
