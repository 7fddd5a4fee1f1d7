"""The autoencoder, from 64x64 greyscale images to 16x16 latents of 4 channels and back.

`DiTPipeline` scales latents by one number and does not shift them. So after training, mean and deviation of every
latent channel are folded into the 1x1 convolutions on both sides of the latents (`normalise_latents`, exact
up to rounding): they come out with mean 0 and deviation 1, and `scaling_factor` is 1.
"""

import dataclasses

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from harmonica_training.digits.config import DigitsConfig
from harmonica_training.digits.data import DigitsSplit, augment, batches
from harmonica_training.digits.optim import learning_rate, set_learning_rate

LATENT_CHANNELS = 4
DOWNSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class AutoencoderTraining:
    """A trained autoencoder, in evaluation mode, and its mean loss over the last tenth of the steps."""

    model: AutoencoderKL
    final_loss: float


def build_autoencoder(image_size: int) -> AutoencoderKL:
    """An untrained autoencoder for images [B, 1, image_size, image_size] in [-1, 1]."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=image_size,
        scaling_factor=1.0,
    )


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """Mean latents [B, 4, H/4, W/4] of images [B, 1, H, W] in [0, 1]."""
    parts = [model.encode(part * 2.0 - 1.0).latent_dist.mode() for part in images.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor, batch: int = 64) -> Tensor:
    """Images [B, 1, H, W] in [0, 1] of latents [B, 4, H/4, W/4]."""
    parts = [model.decode(part).sample for part in latents.split(batch)]
    return (torch.cat(parts) / 2.0 + 0.5).clamp(0.0, 1.0)


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Fold per-channel mean and deviation of the latents of `images` into the model, in place.

    Args:
        model: afterwards its latents of `images` have mean 0 and deviation 1, and decode to the same images.
        images: [N, 1, H, W] in [0, 1].

    Raises:
        TypeError: the model has no 1x1 convolutions around its latents.
    """
    quant, post_quant = model.quant_conv, model.post_quant_conv
    if not (isinstance(quant, nn.Conv2d) and isinstance(post_quant, nn.Conv2d)):
        raise TypeError("the autoencoder needs use_quant_conv=True and use_post_quant_conv=True")
    if quant.bias is None or post_quant.bias is None:
        raise TypeError("the convolutions around the latents need a bias")
    latents = encode(model, images)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))  # [C]
    # z' = (z - mean) / std on the way in; its log-variance follows; z = std * z' + mean on the way out
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2.0 * std.log()
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= std[None, :, None, None]


def train_autoencoder(config: DigitsConfig, data: DigitsSplit) -> AutoencoderTraining:
    """Train on augmented images with mean absolute error and a light KL, then normalise the latents."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = build_autoencoder(config.image_size).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    order = batches(len(data.train_labels), config.autoencoder_batch, generator)
    losses: list[float] = []
    progress = tqdm(range(config.autoencoder_steps), desc="autoencoder", unit="step", mininterval=5.0)
    for step in progress:
        images = augment(data.train_images[next(order)], generator) * 2.0 - 1.0
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded, images) + config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        set_learning_rate(optimizer, learning_rate(step, config.autoencoder_steps, config.autoencoder_lr))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    model.eval()
    normalise_latents(model, data.train_images)
    tail = losses[-max(1, len(losses) // 10) :]
    return AutoencoderTraining(model, sum(tail) / len(tail))
