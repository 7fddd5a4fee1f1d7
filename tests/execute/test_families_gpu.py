"""Every family on a GPU against the reference, with CUDA graphs and without."""

from __future__ import annotations

import pytest
import torch

import harmonica_rt as hrt

pytest.importorskip("diffusers", reason="the pipelines are diffusers'")

from tests.tiny import families, random_schedule

pytestmark = pytest.mark.gpu

STEPS = 6


@pytest.mark.parametrize("graphs", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lowering", ["plain", "fused", "inductor"])
@pytest.mark.parametrize("name", list(families()))
def test_pipelines_pass_parity(name: str, lowering: str, dtype: torch.dtype, graphs: str) -> None:
    family = families()[name]
    pipeline = family.build().to("cuda", dtype)
    pipeline.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipeline.transformer, STEPS)
    arguments = {
        key: value.to("cuda", dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in family.guided.items()
    }
    report = hrt.verify(pipeline, schedule, lowering=lowering, graphs=graphs, num_inference_steps=STEPS, **arguments)
    assert report.ok
