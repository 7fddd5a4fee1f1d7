"""A small DiT to train schedules for, and configurations that take seconds."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from harmonica_training import TrainConfig
from tests import tiny

SITES = 12


def dit(layers: int = SITES // 2) -> Any:
    """A DiT with enough sites for a target to be met, and a label for each of its ten classes."""
    torch.manual_seed(0)
    transformer = d.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=4,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
    )
    pipeline = d.DiTPipeline(tiny.randomised(transformer), tiny.vae(4), d.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def config(**options: Any) -> TrainConfig:
    """Without guidance: class 1000 of DiTPipeline is none of this model's."""
    defaults: dict[str, Any] = {
        "steps": 8,
        "iterations": 12,
        "batch": 2,
        "learning_rate": 0.3,
        "renew_every": 4,
        "exchanges": 1,
    }
    how_much = {"target_speedup", "target_cur", "beta"} & set(options)
    return TrainConfig(**{**defaults, "guidance": 1.0, **({} if how_much else {"target_speedup": 1.4}), **options})


PAPER: dict[str, Any] = {"gates": "soft", "coherence": 0.0}
