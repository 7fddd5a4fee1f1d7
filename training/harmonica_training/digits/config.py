"""The configuration of a digits run; `DigitsConfig` holds everything that affects the trained parameters."""

import dataclasses

NUM_CLASSES = 10
NULL_CLASS = 1000  # `DiTPipeline` hard-codes this row of the class table as "no class"


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Training of the classifier, the autoencoder and the denoiser; the defaults made the bundled model.

    Attributes:
        seed: seeds the initial parameters, the augmentation, the batches and the noise.
        image_size: side of the square images, pixels; a multiple of 8, at least 16.
        classifier_steps, classifier_batch, classifier_lr: AdamW steps, images per step, peak learning rate.
        autoencoder_steps, autoencoder_batch, autoencoder_lr: the same for the autoencoder.
        kl_weight: weight of the mean KL per latent element beside the mean absolute pixel error.
        augmentations: shifted, turned and scaled copies of each training image that are encoded once.
        layers, heads, head_dim: blocks, attention heads and channels per head of the denoiser.
        denoiser_steps, denoiser_batch, denoiser_lr: AdamW steps, latents per step, peak learning rate.
        label_dropout: share of the labels replaced by the null class, for guidance.
        ema_decay: decay of the averaged parameters; lower during their warm-up.
        checkpoint_seconds: wall time between two checkpoints of the denoiser, seconds.
    """

    seed: int = 0
    image_size: int = 64
    classifier_steps: int = 600
    classifier_batch: int = 64
    classifier_lr: float = 2e-3
    autoencoder_steps: int = 700
    autoencoder_batch: int = 32
    autoencoder_lr: float = 3e-3
    kl_weight: float = 1e-3
    augmentations: int = 8
    layers: int = 10
    heads: int = 4
    head_dim: int = 32
    denoiser_steps: int = 3000
    denoiser_batch: int = 32
    denoiser_lr: float = 1e-3
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.image_size < 16 or self.image_size % 8:
            raise ValueError(
                f"image_size must be a multiple of 8, at least 16 (4x autoencoder, patches of 2); got {self.image_size}"
            )
        for name in ("classifier_steps", "autoencoder_steps", "denoiser_steps", "augmentations", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.label_dropout < 1.0:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")

    @classmethod
    def quick(cls, seed: int = 0) -> "DigitsConfig":
        """A run of a few seconds whose model can be loaded and sampled, but draws no digits."""
        return cls(
            seed=seed, image_size=16, classifier_steps=20, autoencoder_steps=6, autoencoder_batch=16,
            augmentations=1, layers=2, heads=2, head_dim=16, denoiser_steps=6, denoiser_batch=16,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the saved model is measured.

    Attributes:
        images: number of images generated, the classes in turn.
        steps: sampler steps.
        guidance_scale: classifier-free guidance; 1 means none.
        seed: seed of the initial noise.
        batch: images generated together.
    """

    images: int = 1000
    steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 1
    batch: int = 50

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
