"""U-ViT, the example of a model that is not diffusers': its sites are chosen by globs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.recipes.uvit import UViT
from tests.tiny import randomised, saved_and_loaded, vae

PATTERNS = ["**.attn", "**.mlp"]
STEPS = 6


def uvit_pipeline() -> Any:
    """A U-ViT of five blocks, DPM-Solver++."""
    model = randomised(UViT(sample_size=4, width=32, depth=5, heads=2))
    return d.DiTPipeline(model, vae(4), d.DPMSolverSinglestepScheduler())


def test_the_model_has_the_papers_size() -> None:
    with torch.device("meta"):
        huge = UViT()
    assert sum(parameter.numel() for parameter in huge.parameters()) / 1e6 == pytest.approx(501, abs=0.5)


def test_sites_are_those_of_the_released_routers(tmp_path: Path) -> None:
    model = UViT(sample_size=4, width=32, depth=5, heads=2)
    blocks = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert find_sites(model, PATTERNS) == [f"{block}.{name}" for block in blocks for name in ("attn", "mlp")]


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_compiled_equals_reference_through_the_pipeline(tmp_path: Path, lowering: str) -> None:
    pipeline = saved_and_loaded(uvit_pipeline, tmp_path)
    schedule = Schedule.random(0.5, steps=STEPS, sites=find_sites(pipeline.transformer, PATTERNS), seed=0)
    report = hrt.verify(pipeline, schedule, lowering=lowering, class_labels=[1, 2], num_inference_steps=STEPS)
    assert report.ok
    assert len(report.steps) == STEPS
    assert lowering == "fused" or all(step.same_bits for step in report.steps)


def test_an_even_number_of_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="odd number of blocks, got 4"):
        UViT(depth=4)
