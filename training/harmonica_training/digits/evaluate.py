"""Measures a saved model: whether the classifier recognises the requested digits, and how the images vary."""

import dataclasses
import io
from pathlib import Path

import torch
from diffusers import DiTPipeline
from torch import Tensor
from tqdm import tqdm

from harmonica_rt.schedule.files import write_atomically
from harmonica_training.digits.classifier import accuracy, load_classifier, penultimate_features
from harmonica_training.digits.config import NUM_CLASSES, EvaluationConfig
from harmonica_training.digits.data import DigitsSplit


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of a saved model.

    Attributes:
        classifier_accuracy: of the classifier on held-out real digits, in [0, 1].
        generated_accuracy: share of generated images recognised as the class asked for, in [0, 1].
        per_class_accuracy: the same for each class, 0 to 9.
        diversity: `diversity` of the generated images relative to the real training images.
        novelty: `nearest_distance` of the generated images to the training images, relative to that of the
            held-out real ones; much below 1 would mean copies.
        frechet: `frechet_distance` of classifier features, generated against all real images.
        frechet_real: the same of the held-out against the training images, the figure to compare with.
    """

    classifier_accuracy: float
    generated_accuracy: float
    per_class_accuracy: list[float]
    diversity: float
    novelty: float
    frechet: float
    frechet_real: float


def load_pipeline(directory: Path | str) -> DiTPipeline:
    """The pipeline of `directory` in float32 on the CPU, without progress bars of its own."""
    pipe = DiTPipeline.from_pretrained(str(directory))  # float32 unless another dtype is asked for
    if not isinstance(pipe, DiTPipeline):
        raise TypeError(f"expected a DiTPipeline in {directory}, got {type(pipe).__name__}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def requested_labels(count: int) -> Tensor:
    """Labels 0, 1, ..., 9, 0, ... as int64 [count]."""
    return torch.arange(count) % NUM_CLASSES


def generate(pipe: DiTPipeline, config: EvaluationConfig) -> Tensor:
    """Images [config.images, 1, H, W] in [0, 1] of `requested_labels`; one seed, drawn batch after batch."""
    generator = torch.Generator().manual_seed(config.seed)
    parts = []
    labels = requested_labels(config.images).split(config.batch)
    for part in tqdm(labels, desc="generate", unit="batch", mininterval=5.0):
        images = pipe(
            class_labels=part.tolist(),
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.steps,
            generator=generator,
            output_type="pt",
        ).images
        parts.append(images)
    return torch.cat(parts)


def diversity(images: Tensor, labels: Tensor) -> float:
    """Standard deviation over the images of a class, mean over pixels and classes; intensity in [0, 1].

    Args:
        images: [N, 1, H, W] in [0, 1].
        labels: int64 [N]; at least two images of each class that occurs.
    """
    spreads = [images[labels == label].std(dim=0).mean() for label in labels.unique()]
    return float(torch.stack(spreads).mean())


def nearest_distance(images: Tensor, references: Tensor) -> float:
    """Mean Euclidean distance from each image [N, 1, H, W] to the nearest of `references` [M, 1, H, W]."""
    return float(torch.cdist(images.flatten(1), references.flatten(1)).amin(dim=1).mean())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (Heusel et al., arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), in float64.

    Args:
        first, second: [N, D] and [M, D], each with at least two rows.

    Raises:
        ValueError: the shapes do not fit.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"expected [N, D] and [M, D] with N, M >= 2, got {list(first.shape)} and {list(second.shape)}")
    first, second = first.double(), second.double()
    shift = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    cov1, cov2 = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T  # C1^1/2
    product = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0.0)
    return float(shift + cov1.trace() + cov2.trace() - 2.0 * product.sqrt().sum())


def evaluate(directory: Path, data: DigitsSplit, config: EvaluationConfig) -> tuple[Evaluation, Tensor]:
    """Generate with the saved pipeline of `directory` and judge with its saved classifier.

    Returns:
        the figures, and the images [config.images, 1, H, W] in [0, 1].
    """
    classifier = load_classifier(directory / "classifier")
    images = generate(load_pipeline(directory), config)
    labels = requested_labels(config.images)
    per_class = [accuracy(classifier, images[labels == label], labels[labels == label]) for label in labels.unique()]
    train_features = penultimate_features(classifier, data.train_images)
    test_features = penultimate_features(classifier, data.test_images)
    features = penultimate_features(classifier, images)
    real = nearest_distance(data.test_images, data.train_images)
    return (
        Evaluation(
            classifier_accuracy=accuracy(classifier, data.test_images, data.test_labels),
            generated_accuracy=accuracy(classifier, images, labels),
            per_class_accuracy=per_class,
            diversity=diversity(images, labels) / diversity(data.train_images, data.train_labels),
            novelty=nearest_distance(images, data.train_images) / real,
            frechet=frechet_distance(features, torch.cat([train_features, test_features])),
            frechet_real=frechet_distance(test_features, train_features),
        ),
        images,
    )


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write images [N, 1, H, W] in [0, 1] as one PNG, row by row; an incomplete last row is left out."""
    from PIL import Image

    rows, (height, width) = len(images) // columns, images.shape[-2:]
    if rows == 0:
        raise ValueError(f"a grid of {columns} columns needs at least {columns} images, got {len(images)}")
    tiles = images[: rows * columns, 0].reshape(rows, columns, height, width)
    sheet = tiles.permute(0, 2, 1, 3).reshape(rows * height, columns * width)
    buffer = io.BytesIO()
    Image.fromarray((sheet * 255.0).round().byte().numpy()).save(buffer, format="png")
    write_atomically(path, buffer.getvalue())
