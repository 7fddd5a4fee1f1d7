"""Compares images with the uncached images of the same noise and with real digits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from harmonica_rt.demo import bundled_model
from harmonica_training.digits import (
    DigitClassifier,
    classify,
    frechet_distance,
    load_classifier,
    load_split,
    penultimate_features,
)


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of images.

    Attributes:
        psnr: mean over the images that differ from their uncached ones, in dB; None if none differs. Equal images have
            infinite PSNR and are left out, so read it together with `identical`.
        identical: number of images equal to their uncached ones in all 8-bit pixels.
        ssim: mean over all images.
        frechet_to_uncached: Frechet distance to the uncached images of the same seed, in classifier features.
        frechet_to_real: Frechet distance to all real digits, in classifier features.
        accuracy: share of images that are classified as requested, in [0, 1].
    """

    psnr: float | None
    identical: int
    ssim: float
    frechet_to_uncached: float
    frechet_to_real: float
    accuracy: float


class Judge:
    """Measures images.

    Args:
        classifier: computes features and classes.
        real: real images, float32 `[M, 1, H, W]` in [0, 1].
    """

    def __init__(self, classifier: DigitClassifier, real: Tensor) -> None:
        self._classifier = classifier
        self._real = penultimate_features(classifier, real)

    def measure(self, images: Tensor, uncached: Tensor, labels: Tensor) -> Metrics:
        """Compare images with the uncached images of the same noise.

        Args:
            images: uint8 `[N, 1, H, W]`, N at least 2.
            uncached: uint8, in the same shape and order.
            labels: the requested classes, int64 `[N]`.

        Raises:
            ValueError: the shapes do not fit.
        """
        if images.shape != uncached.shape or len(labels) != len(images):
            raise ValueError(
                f"expected as many uncached images and labels as images, got {list(images.shape)}, "
                f"{list(uncached.shape)} and {list(labels.shape)}"
            )
        found, truth = images.float() / 255, uncached.float() / 255
        features = penultimate_features(self._classifier, found)
        differ = (images != uncached).flatten(1).any(dim=1)
        return Metrics(
            psnr=float(psnr(found[differ], truth[differ]).mean()) if differ.any() else None,
            identical=int((~differ).sum()),
            ssim=float(ssim(found, truth).mean()),
            frechet_to_uncached=_frechet(features, penultimate_features(self._classifier, truth)),
            frechet_to_real=_frechet(features, self._real),
            accuracy=float((classify(self._classifier, found) == labels).double().mean()),
        )


@functools.cache
def bundled_judge() -> Judge:
    """The judge with the bundled classifier and all real digits, 64 x 64."""
    digits = load_split(64)
    real = torch.cat([digits.train_images, digits.test_images])
    return Judge(load_classifier(bundled_model() / "classifier"), real)


def _frechet(first: Tensor, second: Tensor) -> float:
    return max(0.0, frechet_distance(first, second))  # for equal features, rounding may leave it slightly below zero


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image `[N, C, H, W]` in [0, 1]; dB, `[N]`."""
    return peak_signal_noise_ratio(images, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image `[N, C, H, W]` in [0, 1], `[N]` (Wang et al. 2004: Gaussian, sigma 1.5)."""
    result = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    if not isinstance(result, Tensor):
        raise TypeError(f"expected one tensor of similarities, got {type(result).__name__}")
    return result
