"""The bundled digits model: a latent DiT on the UCI handwritten digits, trained and measured from here.

`python -m harmonica_training.digits` makes it. Quality benchmarks use the classifier and
its features.
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
