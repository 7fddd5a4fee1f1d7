"""Tiny pipelines of real diffusers classes with random parameters, saved and loaded as any pipeline is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers as d
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.models import random_schedule as random_schedule


def randomised(model: Any) -> Any:
    """The model in eval mode, with normally distributed parameters everywhere, adaLN gates included."""
    for parameter in model.parameters():
        if parameter.numel():  # torch warns of those without elements
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def vae(latent_channels: int, **config: Any) -> Any:
    """A small autoencoder without downsampling."""
    return randomised(
        d.AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, latent_channels=latent_channels, sample_size=8, **config
        )
    )


def flow_vae(latent_channels: int) -> Any:
    """A small autoencoder as SD3 and Flux have it: without convolutions around its latents, which are shifted."""
    return vae(latent_channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5)


def dit(layers: int = 2) -> Any:
    """DiT, DDIM."""
    transformer = d.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=4,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    )
    return d.DiTPipeline(randomised(transformer), vae(4), d.DDIMScheduler())


def _pixart_transformer() -> Any:
    return randomised(
        d.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=12,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        )
    )


def _pixart(pipeline: Any) -> Any:
    """DPM-Solver++, prompts given as embeddings."""
    return pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(4),
        transformer=_pixart_transformer(),
        scheduler=d.DPMSolverMultistepScheduler(),
    )


def pixart_alpha() -> Any:
    """PixArt-alpha."""
    return _pixart(d.PixArtAlphaPipeline)


def pixart_sigma() -> Any:
    """PixArt-Sigma."""
    return _pixart(d.PixArtSigmaPipeline)


def pixart_from_words() -> Any:
    """PixArt-alpha with a T5 encoder and a tokenizer of ten words."""
    words = ["<pad>", "</s>", "<unk>", "a", "the", "small", "cat", "on", "moon", "dog"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    encoder = T5EncoderModel(T5Config(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    return d.PixArtAlphaPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        text_encoder=randomised(encoder),
        vae=vae(4),
        transformer=_pixart_transformer(),
        scheduler=d.DPMSolverMultistepScheduler(),
    )


def sd3(layers: int = 3) -> Any:
    """SD3 with a block of dual attention, flow matching."""
    transformer = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        out_channels=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    nothing = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return d.StableDiffusion3Pipeline(
        transformer=randomised(transformer), scheduler=d.FlowMatchEulerDiscreteScheduler(), vae=flow_vae(16), **nothing
    )


def flux(layers: int = 2) -> Any:
    """Flux with `layers` blocks of each kind, guidance embeddings and dynamic shifting, flow matching."""
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flow_vae(1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=randomised(transformer),
    )


@dataclass(frozen=True)
class Family:
    """A pipeline, and the arguments of its call with and without guidance."""

    build: Callable[[], Any]
    guided: dict[str, Any]
    unguided: dict[str, Any]


def _prompt(**embeddings: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in embeddings.items()}


def families() -> dict[str, Family]:
    """Every family by name."""
    small = {"height": 8, "width": 8}
    pixart = {
        **_prompt(prompt_embeds=(1, 7, 12), negative_prompt_embeds=(1, 7, 12)),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "negative_prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]]),
        "negative_prompt": None,
        "use_resolution_binning": False,
        **small,
    }
    sd3_prompt = {
        **_prompt(prompt_embeds=(1, 5, 12), pooled_prompt_embeds=(1, 10)),
        **_prompt(negative_prompt_embeds=(1, 5, 12), negative_pooled_prompt_embeds=(1, 10)),
        **small,
    }
    flux_prompt = {**_prompt(prompt_embeds=(1, 5, 12), pooled_prompt_embeds=(1, 10)), **small}
    negative = _prompt(negative_prompt_embeds=(1, 5, 12), negative_pooled_prompt_embeds=(1, 10))
    dit_call = {"class_labels": [1, 2]}
    return {
        "dit": Family(dit, {**dit_call, "guidance_scale": 2.0}, {**dit_call, "guidance_scale": 1.0}),
        "pixart-alpha": Family(pixart_alpha, pixart, {**pixart, "guidance_scale": 1.0}),
        "pixart-sigma": Family(pixart_sigma, pixart, {**pixart, "guidance_scale": 1.0}),
        "sd3": Family(sd3, sd3_prompt, {**sd3_prompt, "guidance_scale": 0.0}),
        # true guidance calls the model twice per step
        "flux": Family(flux, {**flux_prompt, **negative, "true_cfg_scale": 2.0}, flux_prompt),
    }


def shallow_dit() -> Any:
    """DiT with one block, two sites, for tests that depend on the pipeline more than on its model."""
    return dit(layers=1)


def shallow(name: str) -> Family:
    """SD3 or Flux with one block of each kind: SD3 has one of dual attention, and the last one, without text outputs.

    For tests that depend on how blocks differ, not on how many there are.
    """
    return replace(families()[name], build={"sd3": partial(sd3, layers=2), "flux": partial(flux, layers=1)}[name])


def saved_and_loaded(build: Callable[[], Any], directory: Path) -> Any:
    """Build, save, and load with `from_pretrained`; without progress bars."""
    torch.manual_seed(0)
    built = build()
    built.save_pretrained(directory)
    absent = [name for name, component in built.components.items() if component is None]
    pipeline = type(built).from_pretrained(directory, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def built(build: Callable[[], Any]) -> Any:
    """What `build` gives, with the same parameters every time and without progress bars."""
    torch.manual_seed(0)
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, steps: int, seed: int = 0, **arguments: Any) -> NDArray[Any]:
    """Images of one run."""
    generator = torch.Generator().manual_seed(seed)
    images: NDArray[Any] = pipeline(
        num_inference_steps=steps, generator=generator, output_type="np", **arguments
    ).images
    return images
