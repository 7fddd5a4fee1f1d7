"""What the emoji denoiser learns is what its scheduler expects, and it depends on the prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the emoji model is a diffusers pipeline")
pytest.importorskip("transformers", reason="its prompts have a T5 encoder")

from harmonica_training.emoji import EmojiConfig
from harmonica_training.emoji.denoiser import TextToLatents, build_scheduler, denoiser_losses
from harmonica_training.emoji.streams import Use, noise, stream
from harmonica_training.emoji.vocabulary import build_tokenizer, tokenize
from tests.training.emoji_squares import squares

CONFIG = EmojiConfig.quick()
CLEAN = torch.full((1, 8, 16, 16), 0.7)  # the only latents there are


def velocity(noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The velocity at noisy latents if the clean ones are known: clean = sqrt(a) noisy - sqrt(1 - a) velocity."""
    share = build_scheduler().alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return (share.sqrt() * noisy - CLEAN) / (1.0 - share).sqrt()


class Oracle(nn.Module):
    """A denoiser that knows the clean latents, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        self.calls.append((noisy, timesteps, tokens, mask))
        return velocity(noisy, timesteps)


def constant_vae() -> Any:
    return SimpleNamespace(
        encode=lambda images: SimpleNamespace(
            latent_dist=SimpleNamespace(mode=lambda: CLEAN.expand(len(images), -1, -1, -1))
        )
    )


def test_a_denoiser_without_error_has_no_loss_and_samples_the_clean_latents() -> None:
    oracle = Oracle()
    parts = denoiser_losses(oracle, constant_vae(), build_tokenizer(), CONFIG, squares())(0)  # type: ignore[arg-type]
    assert sum(float(part()) for part in parts) == pytest.approx(0.0, abs=1e-6)

    scheduler = build_scheduler()
    scheduler.set_timesteps(20)
    latents = noise((1, 8, 16, 16), stream(0, Use.HELD_OUT)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, timestep[None]), timestep, latents).prev_sample
    torch.testing.assert_close(latents, CLEAN, atol=1e-3, rtol=0.0)


def test_batches_spread_over_timesteps_and_drop_some_prompts() -> None:
    oracle, config = Oracle(), EmojiConfig(emoji=3, batch=40)
    losses = denoiser_losses(oracle, constant_vae(), build_tokenizer(), config, squares())  # type: ignore[arg-type]
    for step in range(5):
        for part in losses(step):
            part()
    timesteps = torch.cat([call[1] for call in oracle.calls])
    for batch in timesteps.split(40):
        assert torch.equal((batch // 25).sort().values, torch.arange(40))  # one in each fortieth of 1,000
    lengths = torch.cat([call[3] for call in oracle.calls]).sum(dim=1)
    dropped = (lengths == 1).float().mean()  # only the end is left
    assert 0.04 <= dropped <= 0.18  # 0.1 of 200, give or take 3.7 deviations


def test_the_prompt_reaches_the_velocity() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = TextToLatents(CONFIG, len(tokenizer)).eval()
    nn.init.normal_(model.transformer.proj_out.weight, std=0.1)  # zero at the start of a training
    tokens, mask = tokenize(tokenizer, ["an octopus left of a key on blue", "a key left of an octopus on blue"])
    noisy = noise((1, 8, 16, 16), stream(0, Use.HELD_OUT)).expand(2, -1, -1, -1)
    with torch.no_grad():
        first, second = model(noisy, torch.tensor([500, 500]), tokens, mask)
    assert (first - second).abs().max() > 1e-3  # the order of the words counts
