"""Which call reuses what: against a truth written here, not against the reference (which shares the logic)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.sampling.loops import STEPS, Conditioned, first_latents, model_time
from tests.tiny import random_schedule

Plan = list[list[torch.Tensor]]  # the conditioning of each call of each step


class HandWritten:
    """A pipeline as people write them: a model, a scheduler, a loop that knows nothing of schedules."""

    def __init__(self, model: nn.Module) -> None:
        self.transformer = model
        self.scheduler = DDIMScheduler()
        self.outputs: list[torch.Tensor] = []

    def __call__(self, plan: Plan) -> torch.Tensor:
        latents = first_latents()
        self.outputs = []
        self.scheduler.set_timesteps(STEPS)
        for conditioning, timestep in zip(plan, self.scheduler.timesteps, strict=True):
            step = [self.transformer(latents, model_time(timestep), each) for each in conditioning]
            self.outputs += step
            latents = self.scheduler.step(sum(step) / len(step), timestep, latents).prev_sample
        return latents


def truth(model: nn.Module, schedule: Schedule, plan: Plan) -> torch.Tensor:
    """Each conditioning has features of its own. One that lacks what the schedule wants to reuse computes in full."""
    features: dict[int, dict[int, tuple[int, torch.Tensor]]] = {}
    scheduler, latents = DDIMScheduler(), first_latents()
    scheduler.set_timesteps(STEPS)
    for step, (conditioning, timestep) in enumerate(zip(plan, scheduler.timesteps, strict=True)):
        outputs = []
        for each in conditioning:
            held = features.setdefault(id(each), {})
            reused = [int(site) for site in np.flatnonzero(~schedule.compute[step])]
            wanted = {site: max(s for s in range(step) if schedule.compute[s, site]) for site in reused}
            if any(site not in held or held[site][0] < source for site, source in wanted.items()):
                reused = []
            hooks = [
                model.get_submodule(name).register_forward_hook(
                    functools.partial(_reuse_or_hold, held=held, site=site, step=step, reuse=site in reused)
                )
                for site, name in enumerate(schedule.sites)
            ]
            outputs.append(model(latents, model_time(timestep), each))
            for handle in hooks:
                handle.remove()
        latents = scheduler.step(sum(outputs) / len(outputs), timestep, latents).prev_sample
    return latents


def _reuse_or_hold(
    module: nn.Module,
    args: Any,
    output: torch.Tensor,
    *,
    held: dict[int, tuple[int, torch.Tensor]],
    site: int,
    step: int,
    reuse: bool,
) -> torch.Tensor | None:
    if reuse:
        return held[site][1]
    held[site] = (step, output.clone())
    return None


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Conditioned().eval().requires_grad_(False)


U, C = torch.randn(2, 3, generator=torch.Generator().manual_seed(5)), torch.zeros(2, 3)

PLANS: dict[str, Plan] = {
    "one call": [[C]] * 6,
    "two calls": [[U, C]] * 6,
    "guidance cut off": [[U, C]] * 3 + [[C]] * 3,
    "guidance begins late": [[C]] * 3 + [[U, C]] * 3,
    "order swapped": [[U, C]] * 3 + [[C, U]] * 3,
    "steps left out": [[U, C], [U, C], [C], [U, C], [U], [U, C]],
    "prompt swapped": [[C]] * 3 + [[U]] * 3,
    "prompt back again": [[C], [C], [U], [U], [C], [C]],
    "equal prompts": [[C, C]] * 6,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [name for name in PLANS if name != "equal prompts"])
def test_a_call_reuses_only_features_of_its_own_conditioning(model: nn.Module, name: str, seed: int) -> None:
    schedule = random_schedule(model, STEPS, seed)
    pipeline = hrt.compile(HandWritten(model), schedule, strict=True, debug=True)
    assert torch.equal(pipeline(PLANS[name]), truth(model, schedule, PLANS[name]))


def test_equal_conditioning_keeps_the_order_of_calls(model: nn.Module) -> None:
    schedule = random_schedule(model, STEPS)
    pipeline = hrt.compile(HandWritten(model), schedule, strict=True)
    assert torch.equal(pipeline(PLANS["equal prompts"]), truth(model, schedule, PLANS["one call"]))


@pytest.mark.parametrize("name", ["guidance cut off", "prompt swapped", "prompt back again"])
def test_conditioning_may_have_any_name(model: nn.Module, name: str) -> None:
    class Renamed(Conditioned):
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor, extra: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(latents, timestep, extra)

    torch.manual_seed(1)
    renamed = Renamed().eval().requires_grad_(False)
    schedule = random_schedule(model, STEPS)
    pipeline = hrt.compile(HandWritten(renamed), schedule, strict=True)
    assert torch.equal(pipeline(PLANS[name]), truth(renamed, schedule, PLANS[name]))


def test_conditioning_changed_in_place_is_noticed(model: nn.Module) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = hrt.compile(model, schedule, strict=True)
    prompt = torch.zeros(2, 3)
    latents = first_latents()
    compiled(latents, torch.full((2,), 1.0), prompt)
    prompt += 1
    got = compiled(latents, torch.full((2,), 0.9), prompt)  # a reuse step, were it not for the change
    assert torch.equal(got, model(latents, torch.full((2,), 0.9), prompt))
    stats = compiled.stats
    assert stats is not None
    assert stats.catch_ups == [1]


def test_conditioning_may_come_first(model: nn.Module) -> None:
    class Reordered(Conditioned):
        def forward(self, context: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(latents, timestep, context)

    reordered = Reordered().eval().requires_grad_(False)
    compiled = hrt.compile(reordered, Schedule.every(2, steps=2, sites=hrt.find_sites(model)), strict=True)
    latents = first_latents()
    compiled(C, latents, torch.full((2,), 1.0))
    got = compiled(U, latents, torch.full((2,), 0.9))
    assert torch.equal(got, reordered(U, latents, torch.full((2,), 0.9)))


@pytest.mark.parametrize("inference", [True, False], ids=["inference_mode", "no_grad"])
def test_grad_modes_may_alternate(model: nn.Module, inference: bool) -> None:
    schedule = random_schedule(model, STEPS)
    pipeline = hrt.compile(HandWritten(model), schedule, strict=True, lowering="plain")
    expected = truth(model, schedule, PLANS["two calls"])
    for mode in (inference, not inference, inference):
        with torch.inference_mode(mode), torch.no_grad():
            assert torch.equal(pipeline([[U.clone(), C.clone()]] * 6), expected)


def test_results_are_the_callers_to_keep(model: nn.Module) -> None:
    schedule = random_schedule(model, STEPS)
    pipeline = hrt.compile(HandWritten(model), schedule, strict=True, debug=True)
    pipeline(PLANS["two calls"])
    first = pipeline.outputs
    kept = [output.clone() for output in first]
    pipeline(PLANS["two calls"])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_a_smaller_batch_in_mid_run_computes_anew(model: nn.Module) -> None:
    schedule = Schedule.every(2, steps=4, sites=hrt.find_sites(model))
    compiled = hrt.compile(model, schedule, strict=True)
    latents, time = first_latents(), torch.full((2,), 1.0)
    for step in range(3):
        compiled(latents, time - step / 10, C)
    got = compiled(latents[:1], time[:1] - 0.3, C[:1])
    assert torch.equal(got, model(latents[:1], time[:1] - 0.3, C[:1]))
    assert compiled.report().last_catch_ups == (3,)
