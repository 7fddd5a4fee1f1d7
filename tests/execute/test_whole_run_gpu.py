"""A run as one graph on the device: the same facts that the double of CUDA is held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt

pytest.importorskip("diffusers", reason="the schedulers are diffusers'")

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tests.models import random_schedule
from tests.sampling.loops import conditioned
from tests.waiting import no_waiting

pytestmark = pytest.mark.gpu

STEPS = 6


def sample(model: Any, seed: int, scheduler: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    latents = torch.randn(2, 4, 8, device="cuda", generator=generator)
    rows = 4 if "guidance_scale" in options else 2
    prompt = torch.randn(rows, 3, device="cuda", generator=generator)
    with torch.no_grad():
        found: torch.Tensor = model.sample(
            latents, scheduler, prompt=prompt, model_timestep=lambda t: t / 1000, **options
        )
    return found


def begun(make: Any) -> Any:
    scheduler = make()
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.fixture
def model() -> nn.Module:
    return conditioned().cuda()


@pytest.mark.parametrize(
    "make", [lambda: DDIMScheduler(clip_sample=False), DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}], ids=["unguided", "guided"])
@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_it_gives_what_a_run_step_by_step_gives(model: nn.Module, make: Any, options: Any, lowering: str) -> None:
    schedule, scheduler = random_schedule(model, STEPS, seed=2), begun(make)
    compiled = hrt.compile(model, schedule, lowering=lowering, graphs="on", strict=True)
    plain = hrt.compile(model, schedule, lowering=lowering, graphs="off", strict=True)
    kept = []
    for seed in range(6):
        kept.append((sample(compiled, seed, scheduler, **options), sample(plain, seed, scheduler, **options)))
        torch.cuda.empty_cache()
    assert all(torch.allclose(found, expected, rtol=1e-4, atol=1e-4) for found, expected in kept)
    (runtime,) = compiled.plans.values()
    (memory,) = (held.graphed for held in runtime.arenas._held)
    assert memory is not None
    (state,) = memory.samplers.values()
    assert state in memory.graphs._graphs
    assert not compiled.report().graphs.refusals  # type: ignore[union-attr]


def test_parameters_replaced_between_runs(model: nn.Module) -> None:
    schedule, scheduler = random_schedule(model, STEPS, seed=2), begun(lambda: DDIMScheduler(clip_sample=False))
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    linear: Any = model.get_submodule("time")
    for seed in range(4):
        sample(compiled, seed, scheduler)
    for seed in range(3):
        linear.weight.data = linear.weight.data * 1.5
        assert torch.allclose(sample(compiled, seed, scheduler), sample(truth, seed, scheduler), rtol=1e-3, atol=1e-3)


def test_the_host_waits_for_nothing_in_a_run(model: nn.Module) -> None:
    schedule, scheduler = random_schedule(model, STEPS, seed=2), begun(lambda: DDIMScheduler(clip_sample=False))
    compiled = hrt.compile(model, schedule, graphs="on", strict=True)
    for seed in range(5):
        sample(compiled, seed, scheduler)
    with no_waiting():
        sample(compiled, 5, scheduler)
