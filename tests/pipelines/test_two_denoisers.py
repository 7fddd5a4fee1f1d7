"""Pipelines with two denoisers: the one that runs uncached is named."""

from __future__ import annotations

import pytest

import harmonica_rt as hrt
from tests.sampling.loops import STEPS, Pipeline, conditioned
from tests.tiny import random_schedule


@pytest.mark.parametrize("name", ["transformer_2", "unconditional_transformer"])
def test_the_denoiser_that_stays_plain_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(conditioned())
    setattr(pipeline, name, conditioned())
    hrt.compile(pipeline, random_schedule(pipeline.transformer, STEPS))
    (line,) = [line for line in caplog.messages if "more than one denoiser" in line]
    assert f"{name} runs uncached" in line


@pytest.mark.parametrize("name", ["text_encoder", "transformer_2"])
def test_nothing_is_logged_for_one_denoiser(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(conditioned())
    setattr(pipeline, name, conditioned() if name == "text_encoder" else None)
    hrt.compile(pipeline, random_schedule(pipeline.transformer, STEPS))
    assert not [line for line in caplog.messages if "more than one denoiser" in line]
