"""The configuration of an emoji run; `EmojiConfig` holds everything that may not change when a run is resumed.

The number of steps of the denoiser may. The number of threads changes nothing.
"""

import dataclasses

from harmonica_training.emoji.names import EMOJI


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one network is trained: AdamW steps, pictures per step, peak learning rate."""

    steps: int
    batch: int
    rate: float

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.rate > 0.0:
            raise ValueError(f"steps and batch must be at least 1, and the rate above 0; got {self}")


@dataclasses.dataclass(frozen=True)
class EmojiConfig:
    """Training of the autoencoder, the classifier and the denoiser with its text encoder.

    Attributes:
        seed: seeds the initial parameters, the scenes and the noise.
        emoji: how many of `names.EMOJI` are drawn, from the first on.
        autoencoder, classifier: their stages.
        kl_weight: weight of the mean KL per latent element beside the mean absolute error of a pixel's colour.
        normalised_with: pictures whose latents get mean 0 and deviation 1.
        layers, heads: blocks and attention heads of the denoiser; a head has 32 channels.
        text_layers, text_width: blocks and channels of the text encoder.
        batch, rate: pictures per step and peak learning rate of the denoiser and the text encoder.
    """

    seed: int = 0
    emoji: int = len(EMOJI)
    autoencoder: Stage = Stage(5000, 8, 2e-3)
    classifier: Stage = Stage(3000, 16, 2e-3)
    kl_weight: float = 2e-5
    normalised_with: int = 1000
    layers: int = 8
    heads: int = 6
    text_layers: int = 2
    text_width: int = 128
    batch: int = 32
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 3 <= self.emoji <= len(EMOJI):
            raise ValueError(f"emoji must be 3 ... {len(EMOJI)}, got {self.emoji}")
        for name in ("layers", "heads", "text_layers", "text_width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rate > 0.0:
            raise ValueError(f"rate must be above 0, got {self.rate}")

    @classmethod
    def quick(cls, seed: int = 0) -> "EmojiConfig":
        """A run of a few seconds whose model can be loaded and sampled, but draws no emoji."""
        tiny = Stage(4, 4, 1e-3)
        return cls(
            seed=seed, emoji=3, autoencoder=tiny, classifier=tiny, normalised_with=8, layers=2, heads=1,
            text_layers=1, text_width=32, batch=4,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a model is measured.

    Attributes:
        prompts: number of prompts, one picture each.
        steps: sampler steps of DPM-Solver++.
        guidance_scale: classifier-free guidance; 1 means none.
        seed: seed of the prompts and of the initial noise.
        batch: pictures generated together.
    """

    prompts: int = 1000
    steps: int = 20
    guidance_scale: float = 4.5
    seed: int = 1
    batch: int = 50

    def __post_init__(self) -> None:
        for name in ("prompts", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
