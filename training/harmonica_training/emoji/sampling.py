"""The trained networks as a pipeline, and pictures sampled with it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline
from torch import Tensor
from tqdm import tqdm
from transformers import T5Tokenizer

from harmonica_training.emoji.config import EvaluationConfig
from harmonica_training.emoji.denoiser import TextToLatents, build_scheduler
from harmonica_training.emoji.vocabulary import TOKENS


def build_pipeline(model: TextToLatents, vae: AutoencoderKL, tokenizer: T5Tokenizer) -> PixArtAlphaPipeline:
    """A pipeline of these very networks."""
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=vae,
        transformer=model.transformer,
        scheduler=build_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(directory: Path | str) -> PixArtAlphaPipeline:
    """The pipeline of `directory` in float32 on the CPU, without progress bars of its own."""
    pipe = PixArtAlphaPipeline.from_pretrained(str(directory), local_files_only=True)
    if not isinstance(pipe, PixArtAlphaPipeline):
        raise TypeError(f"expected a PixArtAlphaPipeline in {directory}, got {type(pipe).__name__}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: PixArtAlphaPipeline, prompts: Sequence[str], config: EvaluationConfig) -> Tensor:
    """Pictures [len(prompts), 3, 64, 64] in [0, 1]; one seed, drawn batch after batch."""
    generator = torch.Generator().manual_seed(config.seed)
    parts = []
    starts = range(0, len(prompts), config.batch)
    for start in tqdm(starts, desc="sample", unit="batch", mininterval=10.0, disable=len(starts) == 1):
        images = pipe(
            prompt=list(prompts[start : start + config.batch]),
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            generator=generator,
            max_sequence_length=TOKENS,
            clean_caption=False,
            use_resolution_binning=False,  # it knows sizes from 256 pixels up
            output_type="pt",
        ).images
        parts.append(images)
    return torch.cat(parts)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run operators with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
