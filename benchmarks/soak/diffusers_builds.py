"""Builds tiny pipelines of diffusers from a world's seed, variant and sampler; the variant is ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig

from benchmarks.soak import changes
from benchmarks.soak.samplers import SAMPLERS
from tests.tiny import families, randomised


def _built(build: Callable[[], Any], seed: int, sampler: str) -> Any:
    torch.manual_seed(seed)
    pipeline = build()
    pipeline.scheduler = SAMPLERS[sampler]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_family(name: str, seed: int, variant: int, sampler: str) -> Any:
    """The tiny pipeline of a family, with random parameters."""
    return _built(families()[name].build, seed, sampler)


def build_with_loras(name: str, seed: int, variant: int, sampler: str) -> Any:
    """The tiny pipeline of a family with two LoRA adapters, the first of them active."""
    pipeline = build_family(name, seed, variant, sampler)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"])
    for adapter in ("a", "b"):
        pipeline.transformer.add_adapter(config, adapter_name=adapter)
    for key, parameter in pipeline.transformer.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    changes.LORA["adapters"].set(pipeline, 0)
    pipeline.transformer.eval()
    return pipeline


def build_image_prompt(seed: int, variant: int, sampler: str) -> Any:
    """Flux with an IP adapter."""
    pipeline = build_family("flux", seed, variant, sampler)
    model = pipeline.transformer
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=4)
    processors = [FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=12) for _ in model.transformer_blocks]
    weights = {
        f"{index}.{name.replace('ip.0.', 'ip.')}": value
        for index, processor in enumerate(processors)
        for name, value in randomised(processor).state_dict().items()
    }
    projected = {
        name.replace("image_embeds", "proj"): value for name, value in randomised(projection).state_dict().items()
    }
    model._load_ip_adapter_weights([{"image_proj": projected, "ip_adapter": weights}])
    return pipeline


def build_image_to_image(seed: int, variant: int, sampler: str) -> Any:
    """SD3 as an image-to-image pipeline, whose runs start at a later step."""
    return _built(lambda: StableDiffusion3Img2ImgPipeline(**families()["sd3"].build().components), seed, sampler)
