"""lambda: by its definition, with shared prefixes the same numbers at half the calls."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import diffusers as d
import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_training.cached_forward import CachedForward
from harmonica_training.denoising_loop import DenoisingLoop
from harmonica_training.iepo import ImageError, ImageErrors
from tests import tiny

STEPS = 5
METHODS = [method for method in get_args(ImageError) if method != "sensitivity"]  # leave-one-out, divided


class Case:
    """Random scores on a tiny pipeline, and a count of its denoiser's calls."""

    def __init__(self, family: str = "dit", scheduler: Any = None) -> None:
        described = tiny.families()[family]
        pipeline = described.build()
        if scheduler is not None:
            pipeline.scheduler = scheduler
        self.model = pipeline.transformer
        self.inputs = {**described.guided, "class_labels": [1]} if family == "dit" else described.guided
        sites = hrt.find_sites(self.model)
        self.loop = DenoisingLoop(pipeline, steps=STEPS)
        self.cached = CachedForward(self.model, sites)
        self.scores = torch.rand(STEPS, len(sites), generator=torch.Generator().manual_seed(0))
        self.scores[0] = 1.0
        self.calls = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def errors(self, scores: torch.Tensor | None = None) -> ImageErrors:
        scores = self.scores if scores is None else scores
        return ImageErrors(
            self.loop,
            self.cached,
            scores,
            np.array(scores > 0.3),
            self.inputs,
            lambda: [torch.Generator().manual_seed(5)],
            holds="computed",
            precision=contextlib.nullcontext,
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("dit", None),
        ("dit", d.DDPMScheduler()),  # adds noise
        ("pixart-alpha", d.DPMSolverMultistepScheduler()),  # keeps a history
        ("pixart-alpha", d.SASolverScheduler()),
        ("flux", None),  # flow matching, two calls per step
    ],
    ids=["ddim", "ddpm", "dpm-solver++", "sa-solver", "flow-euler"],
)
def test_shared_prefixes_are_exact(method: ImageError, family: str, scheduler: Any) -> None:
    errors = Case(family, scheduler).errors()
    shared = errors.weights(method)
    assert torch.equal(shared, errors.weights(method, share_prefixes=False))
    assert shared[0] == 0
    assert (shared[1:] > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_shared_prefixes_save_half_of_the_calls(method: ImageError) -> None:
    case = Case()

    def count(share: bool) -> int:
        calls: list[int] = []
        forward = type(case.model).forward
        original = case.loop.denoiser.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        case.loop.denoiser.forward = counted
        case.errors().weights(method, share_prefixes=share)
        del case.loop.denoiser.forward
        assert type(case.model).forward is forward
        return len(calls)

    assert count(share=False) == STEPS * STEPS  # a run that caches everywhere, and one for each later step
    assert count(share=True) == STEPS + STEPS * (STEPS - 1) // 2


def test_leave_one_out_follows_its_definition() -> None:
    """Disabling the cache at a step is the same as scores of 1 there."""
    case = Case()
    found = case.errors().weights("leave-one-out")
    everywhere = case.errors()._run(lambda step: True)
    for step in range(1, STEPS):
        scores = case.scores.clone()
        scores[step] = 1.0
        without = case.errors(scores)._run(lambda step: True)
        expected = (everywhere.double() - without.double()).square().mean()
        assert found[step] == expected


def test_progressive_follows_its_definition() -> None:
    """Steps 0 ... t cached against steps 0 ... t-1; the others have scores of 1."""
    case = Case()
    found = case.errors().weights("progressive")

    def cached_up_to(last: int) -> torch.Tensor:
        scores = case.scores.clone()
        scores[last + 1 :] = 1.0
        return case.errors(scores)._run(lambda step: True).double()

    for step in range(1, STEPS):
        expected = (cached_up_to(step) - cached_up_to(step - 1)).square().mean()
        torch.testing.assert_close(found[step], expected, rtol=1e-12, atol=0)


def test_without_caching_there_is_no_error() -> None:
    assert not Case().errors(torch.ones(STEPS, 4)).weights("leave-one-out").any()
