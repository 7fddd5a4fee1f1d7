"""Samples images with one generator per image, so that the noise of image i does not depend on the batch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import harmonica_rt as hrt
from harmonica_rt.schedule.files import write_atomically

GUIDANCE = 2.0  # the bundled model was evaluated with it
BATCH = 20
SEED_STRIDE = 1_000_000  # between the generators of two seeds; more than any number of images


def requested_labels(count: int) -> Tensor:
    """Labels 0, 1, ..., 9, 0, ... as int64 `[count]`."""
    return torch.arange(count) % 10


def generate(
    pipeline: Any, schedule: hrt.Schedule, *, count: int, seed: int, guidance: float = GUIDANCE, batch: int = BATCH
) -> Tensor:
    """Sample `count` images of `requested_labels` with as many steps as the schedule has.

    Args:
        pipeline: a `DiTPipeline`. It is compiled if the schedule reuses anything, and uncompiled afterwards.
        schedule: what to compute in each step.
        count: number of images.
        seed: with the index of an image, it determines the image's noise.
        guidance: guidance scale.
        batch: images per call; it affects only speed and the last bits of floats.

    Returns:
        uint8 `[count, 1, H, W]`.
    """
    labels = requested_labels(count).tolist()
    parts = []
    if schedule.cur:
        hrt.compile(
            pipeline, schedule, lowering="plain", strict=True
        )  # the effect of the schedule alone, without rounding
    try:
        for start in range(0, count, batch):
            chosen = range(start, min(start + batch, count))
            images = pipeline(
                class_labels=labels[chosen.start : chosen.stop],
                guidance_scale=guidance,
                num_inference_steps=schedule.steps,
                generator=[torch.Generator().manual_seed(seed * SEED_STRIDE + index) for index in chosen],
                output_type="pt",
            ).images
            parts.append((images * 255).round().byte().cpu())
    finally:
        if schedule.cur:
            hrt.uncompile(pipeline)
    return torch.cat(parts)


def uncached_path(folder: Path, *, steps: int, seed: int, count: int) -> Path:
    """File of the uncached images of a seed."""
    return folder / f"uncached-t{steps}-seed{seed}-n{count}.npz"


def save(images: Tensor, path: Path) -> None:
    """Write uint8 images `[N, 1, H, W]` compressed, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez_compressed(file, images=images.numpy())
    write_atomically(path, file.getvalue())


def load(path: Path) -> Tensor:
    """Images that `save` wrote, uint8 `[N, 1, H, W]`."""
    with np.load(path) as file:
        return torch.from_numpy(file["images"])
