"""The bundled digits model: a latent DiT on the UCI handwritten digits, which this package trains and measures.

In: the digits that scikit-learn ships. Out: an autoencoder, a denoiser and a classifier, saved as a pipeline that
`from_pretrained` loads, by `python -m harmonica_training.digits`. Quality benchmarks use the classifier and its
features.

Hazard: quality is measured on this model alone, so its images must be recognisable and its numbers reproducible.

Reading order: `config`, `run` (the stages), then `data`, `autoencoder`, `denoiser` with `noisy_batch` and `optim`,
`classifier`, `evaluate`, `export`; `files` reads back what a run wrote.
"""

from harmonica_training.digits.classifier import (
    DigitClassifier,
    classify,
    load_classifier,
    penultimate_features,
)
from harmonica_training.digits.config import DigitsConfig, EvaluationConfig
from harmonica_training.digits.data import DigitsSplit, load_split
from harmonica_training.digits.evaluate import Evaluation, evaluate, frechet_distance, load_pipeline
from harmonica_training.digits.run import train_and_save

__all__ = [
    "DigitClassifier",
    "DigitsConfig",
    "DigitsSplit",
    "Evaluation",
    "EvaluationConfig",
    "classify",
    "evaluate",
    "frechet_distance",
    "load_classifier",
    "load_pipeline",
    "load_split",
    "penultimate_features",
    "train_and_save",
]
