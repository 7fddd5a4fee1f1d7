"""The autoencoder, from 64x64 colour pictures to 16x16 latents of 8 channels and back; trained on fresh pictures.

`digits.autoencoder` encodes, decodes and normalises the latents of both bundled models.
"""

import functools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from harmonica_training.emoji.config import EmojiConfig
from harmonica_training.emoji.drawing import fresh_pictures
from harmonica_training.emoji.glyphs import Glyphs
from harmonica_training.emoji.scenes import SIDE
from harmonica_training.emoji.streams import Use, noise, stream
from harmonica_training.emoji.training import PARTS, LossParts

LATENT_SIDE = SIDE // 4
# 4 as for the digits would be one number per colour and one more for each 4x4 pixels: too blurred to name an emoji
LATENT_CHANNELS = 8
SQUARED_WEIGHT = 2.0  # of the mean squared error, beside the mean absolute one


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder for pictures [B, 3, 64, 64] in [-1, 1], whose latents are nearly free of noise."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    # the logarithm of the variance; left near 0, the noise drowns the latents for the first thousand steps
    nn.init.constant_(model.quant_conv.bias[LATENT_CHANNELS:], -6.0)
    return model


def autoencoder_losses(model: AutoencoderKL, config: EmojiConfig, glyphs: Glyphs) -> LossParts:
    """Mean absolute and squared error and a light KL, on pictures drawn for the step.

    The absolute error alone leaves small emoji the colour of the background for long. Not under bfloat16 autocast,
    although that takes 0.7 of the time: the mean absolute error after 100 steps was 0.156 with it and 0.136 without.
    """

    def parts_of(step: int) -> Sequence[Callable[[], Tensor]]:
        rng = stream(config.seed, Use.AUTOENCODER, step)
        images = fresh_pictures(config.autoencoder.batch, glyphs, rng).images * 2.0 - 1.0
        draws = noise((len(images), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), rng)

        def loss(part: Tensor, draw: Tensor) -> Tensor:
            posterior = model.encode(part).latent_dist
            decoded = model.decode(posterior.mean + posterior.std * draw).sample
            error = F.l1_loss(decoded, part) + SQUARED_WEIGHT * F.mse_loss(decoded, part)
            divergence = posterior.kl().mean() / draw[0].numel()
            total: Tensor = error + config.kl_weight * divergence
            return total * (len(part) / len(images))

        columns = (images.chunk(PARTS), draws.chunk(PARTS))
        return [functools.partial(loss, *row) for row in zip(*columns, strict=True)]

    return parts_of
