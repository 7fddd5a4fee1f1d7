"""What belongs to a request and what moves with the latents, by the oracle of hooks; compiled and reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from tests.sampling.loops import OTHER, PROMPT, STEPS, Conditioned, Oracle, conditioned, first_latents
from tests.tiny import random_schedule

PROMPTS = [PROMPT, OTHER, OTHER + 1]
Build = Callable[[Any, Schedule], Any]
BUILDS: list[Build] = [
    lambda model, schedule: hrt.compile(model, schedule, lowering="plain", strict=True, debug=True),
    hrt.reference,
]


class ManyNames(Conditioned):
    """A prompt under a name that nobody knows, in a list, as Z-Image has it; another input that moves."""

    def forward(  # type: ignore[override]
        self, x: list[torch.Tensor], t: torch.Tensor, cap_feats: list[torch.Tensor], audio_hidden_states: torch.Tensor
    ) -> Any:
        return super().forward(torch.stack(x) + audio_hidden_states, t, torch.stack(cap_feats))


@pytest.fixture
def model() -> ManyNames:
    torch.manual_seed(1)
    return ManyNames().eval()


def call_in(step: int, prompt: torch.Tensor, time: float | None = None) -> list[Any]:
    latents, audio = first_latents() + step, torch.full((2, 4, 8), step / 7)
    timestep = torch.full((2,), 1.0 - step / 10 if time is None else time)
    return [list(latents), timestep, list(prompt.clone()), audio]


@pytest.mark.parametrize("build", BUILDS, ids=["compiled", "reference"])
@pytest.mark.parametrize("seed", range(6))
def test_prompts_that_change_at_any_step(model: ManyNames, seed: int, build: Build) -> None:
    schedule = random_schedule(model, STEPS, seed)
    choose = random.Random(seed)
    prompts = [choose.choice(range(len(PROMPTS))) for _ in range(STEPS)]
    prompts[:2] = [0, 1] if seed % 2 else prompts[:2]  # swapped after the first step
    denoiser, oracle = build(model, schedule), Oracle(model, schedule)
    for step, prompt in enumerate(prompts):
        call = call_in(step, PROMPTS[prompt])
        assert torch.equal(denoiser(*call), oracle(step, prompt, *call))


def test_what_moves_with_the_latents_costs_no_reuse(model: ManyNames, caplog: pytest.LogCaptureFixture) -> None:
    schedule = random_schedule(model, STEPS)
    compiled, oracle = hrt.compile(model, schedule, lowering="plain", strict=True), Oracle(model, schedule)
    for step in range(STEPS):
        call = call_in(step, PROMPT)
        assert torch.equal(compiled(*call), oracle(step, 0, *call))
    report = compiled.report()
    assert report.last_cur == pytest.approx(schedule.cur)
    assert report.last_catch_ups == ()
    assert not [line for line in caplog.messages if "changes from step to step" in line]


@pytest.mark.parametrize("times", [[1.0, 1.0, 0.8, 0.8, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]], ids=str)
def test_equal_timesteps_in_the_first_calls_cost_no_reuse(model: ManyNames, times: list[float]) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    for step, time in enumerate(times):
        compiled(*call_in(step, PROMPT, time))
    report = compiled.report()
    assert report.last_cur == pytest.approx(schedule.cur)
    assert report.last_catch_ups == ()


def test_an_argument_that_changes_in_every_step_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = conditioned()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    for _ in range(2):
        compiled.reset()
        for step in range(STEPS):
            call = first_latents(), torch.full((2,), 1.0 - step / 10), PROMPT + step
            assert torch.equal(compiled(*call), model(*call))
    (line,) = [line for line in caplog.messages if "changes from step to step" in line]
    assert line.startswith("prompt changes")
    caplog.clear()
    compiled.reset()
    for step, prompt in enumerate([PROMPT, PROMPT, OTHER, OTHER, OTHER, OTHER]):
        compiled(first_latents(), torch.full((2,), 1.0 - step / 10), prompt)
    assert not [line for line in caplog.messages if "changes from step to step" in line]
