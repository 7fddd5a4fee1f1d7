"""Learns cache schedules for Diffusion Transformers: `train` a pipeline by a `TrainConfig`, and save the schedule.

This is plain PyTorch without Triton. Of the runtime it uses only `harmonica_rt.schedule` and what that is made of.
"""

from harmonica_training.checkpoint import TrainingInterrupted
from harmonica_training.conditions import (
    ClassLabels,
    Conditions,
    Embeddings,
    class_labels,
    encode_prompts,
    read_prompts,
)
from harmonica_training.config import TrainConfig
from harmonica_training.errors import CheckpointError, DivergenceError, TrainingError
from harmonica_training.trainer import TrainingResult, train

__all__ = [
    "CheckpointError",
    "ClassLabels",
    "Conditions",
    "DivergenceError",
    "Embeddings",
    "TrainConfig",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingResult",
    "class_labels",
    "encode_prompts",
    "read_prompts",
    "train",
]
