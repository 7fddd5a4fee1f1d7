"""The UCI optical handwritten digits of scikit-learn as images of a size worth generating.

The source images are 8x8 counts of ink, 0 to 16. Plain interpolation turns them into grey blobs, so they get a margin,
are interpolated, and pass a soft threshold that restores the edges of the strokes.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 397  # of 1,797 images; the rest, 1,400, train


@dataclasses.dataclass(frozen=True)
class DigitsSplit:
    """Digits, split once and for all.

    Attributes:
        train_images, test_images: float32 [N, 1, H, W] in [0, 1], ink is 1.
        train_labels, test_labels: int64 [N], 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def upsample(counts: Tensor, image_size: int) -> Tensor:
    """Ink counts as sharp images.

    Args:
        counts: float32 [N, 8, 8], 0 to 16.
        image_size: side of the result, pixels.

    Returns:
        float32 [N, 1, image_size, image_size] in [0, 1].
    """
    padded = F.pad(counts[:, None] / 16.0, (1, 1, 1, 1))  # [N, 1, 10, 10]
    smooth = F.interpolate(padded, size=(image_size, image_size), mode="bicubic", align_corners=False)
    ramp = ((smooth - 0.3) / 0.5).clamp(0.0, 1.0)
    return ramp * ramp * (3.0 - 2.0 * ramp)


def load_split(image_size: int) -> DigitsSplit:
    """The digits of `sklearn.datasets.load_digits`: 1,400 to train, 397 held out, the same split every time.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    counts = torch.as_tensor(source.images, dtype=torch.float32)
    labels = torch.as_tensor(source.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=source.target)
    images = upsample(counts, image_size)
    return DigitsSplit(images[train], labels[train], images[test], labels[test])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 8 degrees, scaled by up to 6 %, shifted by up to 4 % of its side.

    Args:
        images: float32 [N, 1, H, W], background 0.
        generator: source of the draws, on the CPU.

    Returns:
        float32 [N, 1, H, W].
    """
    draw = torch.rand(len(images), 4, generator=generator) * 2.0 - 1.0  # [N, 4] in [-1, 1]
    angle = draw[:, 0] * (8.0 * torch.pi / 180.0)
    scale = 1.0 + 0.06 * draw[:, 1]
    shift = 0.08 * draw[:, 2:]  # affine_grid spans [-1, 1], so 0.08 is 4 % of the side
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], dim=1), torch.stack([sin, cos, shift[:, 1]], dim=1)], dim=1
    )  # [N, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices: int64 [min(batch, count)], every index once per pass over the data."""
    batch = min(batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]
