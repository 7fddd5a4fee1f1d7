"""The denoiser, a `PixArtTransformer2DModel`, and the T5 encoder of its prompts, trained together on velocity."""

import functools
from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from harmonica_training.digits.denoiser import initialise_linear
from harmonica_training.emoji.autoencoder import LATENT_CHANNELS, LATENT_SIDE
from harmonica_training.emoji.config import EmojiConfig
from harmonica_training.emoji.drawing import fresh_pictures
from harmonica_training.emoji.glyphs import Glyphs
from harmonica_training.emoji.streams import Use, noise, stream
from harmonica_training.emoji.training import PARTS, LossParts
from harmonica_training.emoji.vocabulary import tokenize

HEAD_CHANNELS = 32
PROMPT_DROPOUT = 0.1  # share of the prompts replaced by the empty one, for guidance


class TextToLatents(nn.Module):
    """The two networks that are trained together.

    Args:
        config: their sizes.
        vocabulary: number of tokens.
    """

    def __init__(self, config: EmojiConfig, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=config.text_width,
                d_kv=HEAD_CHANNELS,
                d_ff=2 * config.text_width,
                num_layers=config.text_layers,
                num_heads=max(1, config.text_width // HEAD_CHANNELS),
                dropout_rate=0.0,
            )
        )
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=HEAD_CHANNELS,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=config.layers,
            cross_attention_dim=config.heads * HEAD_CHANNELS,
            sample_size=LATENT_SIDE,
            patch_size=2,
            caption_channels=config.text_width,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        )
        _initialise(self.transformer)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The velocity [B, 8, 16, 16] of noisy latents [B, 8, 16, 16].

        Args:
            noisy: latents with noise.
            timesteps: int64 [B], 0 ... 999.
            tokens, mask: int64 [B, T], the prompts.
        """
        text = self.text_encoder(tokens, attention_mask=mask).last_hidden_state
        velocity: Tensor = self.transformer(
            noisy, encoder_hidden_states=text, timestep=timesteps, encoder_attention_mask=mask
        ).sample
        return velocity


@torch.no_grad()
def _initialise(model: PixArtTransformer2DModel) -> None:
    """Set initial parameters like DiT's: self-attention and feed-forward add nothing yet, the output is zero. In place.

    Cross-attention adds something from the start, so that the text encoder gets gradients.
    """
    initialise_linear(model, model.pos_embed.proj)
    embedder = model.adaln_single.emb.timestep_embedder
    for layer in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.adaln_single.linear.weight)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)  # rows: shift, scale and gate, of self-attention and of feed-forward
    nn.init.zeros_(model.scale_shift_table)
    nn.init.zeros_(model.proj_out.weight)


def build_scheduler() -> DPMSolverMultistepScheduler:
    """PixArt's noise schedule and sampler, DPM-Solver++ of order 2, but with velocity prediction as for the digits."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="v_prediction",
    )


def denoiser_losses(
    model: TextToLatents, vae: AutoencoderKL, tokenizer: T5Tokenizer, config: EmojiConfig, glyphs: Glyphs
) -> LossParts:
    """Mean squared error of the velocity, on pictures, prompts, timesteps and noise drawn for the step."""
    alphas_cumprod = build_scheduler().alphas_cumprod  # the signal's share of the variance

    def parts_of(step: int) -> Sequence[Callable[[], Tensor]]:
        rng = stream(config.seed, Use.DENOISER, step)
        pictures = fresh_pictures(config.batch, glyphs, rng)
        kept = rng.random(config.batch) >= PROMPT_DROPOUT
        prompts = [scene.prompt if keep else "" for scene, keep in zip(pictures.scenes, kept, strict=True)]
        # stratified timesteps: one from each of B equal bins, which lowers the variance of the loss
        bins = torch.from_numpy((rng.permutation(config.batch) + rng.random(config.batch)) / config.batch)
        timesteps = (bins * len(alphas_cumprod)).long()
        draws = noise((config.batch, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), rng)

        def loss(images: Tensor, draw: Tensor, times: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            with torch.no_grad():
                latents = vae.encode(images * 2.0 - 1.0).latent_dist.mode()
            share = alphas_cumprod[times][:, None, None, None]
            signal, spread = share.sqrt(), (1.0 - share).sqrt()
            velocity = model(signal * latents + spread * draw, times, tokens, mask)
            error: Tensor = (velocity - (signal * draw - spread * latents)).square().mean()
            return error * (len(images) / config.batch)

        columns = (c.chunk(PARTS) for c in (pictures.images, draws, timesteps, *tokenize(tokenizer, prompts)))
        return [functools.partial(loss, *row) for row in zip(*columns, strict=True)]

    return parts_of
