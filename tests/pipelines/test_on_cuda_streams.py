"""Pipelines with graphs on several CUDA streams, on the double of `torch.cuda`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import harmonica_rt as hrt
from tests.cuda_double import CudaDouble, in_place_of_cuda
from tests.execute.on_streams import on_device
from tests.tiers import member
from tests.tiny import built, families, random_schedule, sample, shallow

STEPS = 4


NAMES = [member(name, id=name, always=name in ("dit", "flux")) for name in ("dit", "flux", "sd3", "pixart-alpha")]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_without_graphs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    family = shallow(name) if name in ("sd3", "flux") else families()[name]
    pipeline = built(family.build)
    schedule = random_schedule(pipeline.transformer, STEPS)
    hrt.compile(pipeline, schedule, strict=True)
    expected = sample(pipeline, STEPS, **family.guided)
    hrt.uncompile(pipeline)
    with in_place_of_cuda(monkeypatch, seed=1) as cuda:
        images = images_on_streams(cuda, pipeline, schedule, family.guided)
        replayed = cuda.calls.count("replay")
    for image in images:
        assert np.allclose(image, expected, rtol=1e-4, atol=1e-5)
    assert replayed > STEPS


def images_on_streams(
    cuda: CudaDouble, pipeline: Any, schedule: hrt.Schedule, call: dict[str, Any]
) -> list[NDArray[Any]]:
    """Four runs on two streams in turn: they learn the timesteps, warm up, record, and replay."""
    on_device(pipeline.transformer)
    hrt.compile(pipeline, schedule, strict=True, graphs="on")
    cuda.synchronize()
    streams, images = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for run in range(4):
        with torch.cuda.stream(streams[run % 2]):
            images.append(sample(pipeline, STEPS, **call))
    hrt.uncompile(pipeline)
    return images
