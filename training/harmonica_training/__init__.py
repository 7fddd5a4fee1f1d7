"""Learns cache schedules for Diffusion Transformers: `train` a pipeline by a `TrainConfig`, and save the schedule.

In: a diffusers pipeline, a `TrainConfig`, and conditions (class labels or prompts); no images. Out: a `Schedule`.
This is plain PyTorch without Triton. From the runtime it imports only `harmonica_rt.schedule`, what that imports, and
`harmonica_rt.changes`.

Hazard: a gradient is worth nothing if training does not see what will run. So every iteration runs the pipeline's own
denoising loop, under the cache that it is learning, and the student's errors carry on to the next step.

Reading order: `config` (every option, and the words of the method), `setting` (what is trained: pipeline, sites,
batches of `conditions`, which `prompt_encoder` may encode), `trainer` (the iterations) with `training_state`;
`harmonica` (the objective) with `sdt` and `iepo`; `denoising_loop` (with `scheduler_patches`) and `cached_forward` (how
a pipeline runs with a cache; both use `forward_replacement`); `router`, `target`, `settling` and `validation` (from
scores to a schedule that meets its target); `costs` with `forward_recording`; `progress` with `console_progress` and
`tensorboard_log`; `checkpoint` with `safetensors_file`; `distributed`; `baselines/` and `digits/`.
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
