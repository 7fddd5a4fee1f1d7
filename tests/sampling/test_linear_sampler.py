"""The tables of schedulers against the schedulers' own steps, over their configurations; what is refused, and why."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch

from harmonica_rt.errors import SamplerError, ScheduleMismatchError
from harmonica_rt.execute.sampler import Sampler
from harmonica_rt.execute.sampler_state import SamplerState
from harmonica_rt.sampling.known_samplers import KnownSamplers
from harmonica_rt.sampling.linear_sampler import scheduler_run

SHAPE = (2, 3, 4, 4)
ULPS = 4  # per term of a sum: both runs compute in fp32, in another order

Make = Callable[..., Any]


def ddim(**config: Any) -> Any:
    return d.DDIMScheduler(clip_sample=False, **config)


def dpm(**config: Any) -> Any:
    return d.DPMSolverMultistepScheduler(**config)


MADE: dict[str, Make] = {
    "DDIM": ddim,
    "DDIM-v": lambda: ddim(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "DDIM-sample": lambda: ddim(prediction_type="sample"),
    "DPM++1": lambda: dpm(solver_order=1),
    "DPM++2": dpm,
    "DPM++3": lambda: dpm(solver_order=3),
    "DPM++-heun-karras": lambda: dpm(solver_type="heun", use_karras_sigmas=True),
    "DPM++-euler-at-final": lambda: dpm(euler_at_final=True, lower_order_final=False),
    "DPM++-flow": lambda: dpm(prediction_type="flow_prediction", use_flow_sigmas=True),
    "Euler": d.EulerDiscreteScheduler,
    "Euler-karras-v": lambda: d.EulerDiscreteScheduler(use_karras_sigmas=True, prediction_type="v_prediction"),
    "Heun": d.HeunDiscreteScheduler,
    "flow": d.FlowMatchEulerDiscreteScheduler,
    "flow-shifted": lambda: d.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def begun(scheduler: Any, steps: int) -> tuple[Any, int]:
    """The scheduler with its timesteps set, and their number: Heun's evaluates the model twice in most steps."""
    scheduler.set_timesteps(steps)
    return scheduler, len(scheduler.timesteps)


def own_steps(scheduler: Any, latents: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """What the scheduler itself makes of these model outputs, `[rows, ...]`: the latents after each step."""
    found = []
    for timestep, output in zip(scheduler.timesteps[-len(outputs) :], outputs, strict=True):
        getattr(scheduler, "scale_model_input", lambda *_: None)(latents, timestep)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        found.append(latents)
    return torch.stack(found)


def table_steps(table: Any, first: int, latents: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The same by the table."""
    sampler = Sampler(table, latents, (0.0,) * len(outputs), torch.float32, None, False, first, ("x", "t"))
    state = SamplerState(sampler)
    state.load(sampler)
    found = []
    for row, output in enumerate(outputs):
        state.advance(row, output)
        found.append(state._latents(row + 1).clone())
    assert torch.equal(state.result(), found[-1])
    return torch.stack(found)


def allowed(table: Any, latents: torch.Tensor, outputs: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """What two runs in fp32 may differ by after each step: each rounds its terms, and carries on earlier errors."""
    largest = [float(each.abs().max()) for each in (latents, *expected)]
    size, errors = [max(one, float(m.abs().max())) for one, m in zip(largest, outputs, strict=False)], [0.0]
    for row, weights in enumerate(np.abs(table.weights)):
        rounding = ULPS * torch.finfo(torch.float32).eps
        terms = [
            (a * errors[row - j] + (a + b) * rounding * size[row - j]) for j, (a, b) in enumerate(weights[: row + 1])
        ]
        errors.append(float(sum(terms)))
    return errors[1:]


def agree(table: Any, first: int, own: Any, latents: torch.Tensor, outputs: torch.Tensor) -> bool:
    """Whether the table and the scheduler `own`, which is stepped, make the same of these model outputs."""
    expected, got = own_steps(own, latents, outputs), table_steps(table, first, latents, outputs)
    errors = (got - expected).abs().amax((1, 2, 3, 4)).tolist()
    return all(error <= most for error, most in zip(errors, allowed(table, latents, outputs, expected), strict=True))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("steps", [4, 7, 20])
def test_the_table_takes_the_schedulers_own_steps(name: str, steps: int) -> None:
    scheduler, rows = begun(MADE[name](), steps)
    run = scheduler_run(scheduler, rows, None)
    assert (run.first, len(run.values)) == (0, rows)
    latents = torch.randn(SHAPE) * getattr(scheduler, "init_noise_sigma", 1.0)
    assert agree(run.table, 0, scheduler, latents, torch.randn(rows, *SHAPE))


@pytest.mark.parametrize("shift", [1e-3, 1e-2])
def test_a_table_that_is_slightly_off_does_not_agree(shift: float) -> None:
    scheduler, rows = begun(dpm(), 7)
    table = scheduler_run(scheduler, rows, None).table
    table.weights[3, 1, 0] += shift
    assert not agree(table, 0, scheduler, torch.randn(SHAPE), torch.randn(rows, *SHAPE))


@pytest.mark.parametrize("name", ["DDIM", "DPM++2", "DPM++3", "Euler", "flow"])
@pytest.mark.parametrize("whole", [True, False], ids=["schedule for all steps", "schedule for the last"])
def test_a_run_may_begin_later(name: str, whole: bool) -> None:
    scheduler, steps = begun(MADE[name](), 9)
    run = scheduler_run(scheduler, steps if whole else steps - 4, 4)
    assert (run.first, len(run.values)) == (4 if whole else 0, 5)
    own, latents, outputs = copy.deepcopy(scheduler), torch.randn(SHAPE), torch.randn(5, *SHAPE)
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(4)
        scheduler.set_begin_index(4)
        same = scheduler_run(scheduler, steps, None)  # as the scheduler says itself
        assert np.array_equal(same.table.weights, run.table.weights)
    assert agree(run.table, run.first, own, latents, outputs)


def test_the_input_of_euler_is_scaled_and_others_are_not() -> None:
    euler, _ = begun(d.EulerDiscreteScheduler(), 5)
    scales = scheduler_run(euler, 5, None).table.scales
    assert np.allclose(scales, 1 / np.sqrt(euler.sigmas[:5].double().numpy() ** 2 + 1), rtol=1e-6)
    assert (scheduler_run(begun(ddim(), 5)[0], 5, None).table.scales == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (d.DDIMScheduler, "DDIMScheduler with clip_sample=True clips by values"),
        (lambda: ddim(thresholding=True), "thresholding=True clips"),
        (lambda: dpm(algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver.*draws noise"),
        (lambda: d.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True draws noise"),
        (d.EulerAncestralDiscreteScheduler, "no fixed sum of latents and outputs"),
        (d.LCMScheduler, "no fixed sum|clip"),
        (d.UniPCMultistepScheduler, "of at most 4"),
    ],
    ids=["clip", "threshold", "sde", "stochastic", "ancestral", "lcm", "unipc"],
)
def test_what_is_no_fixed_sum_is_refused_by_name(make: Make, message: str) -> None:
    scheduler, rows = begun(make(), 8)
    drawn = torch.get_rng_state()
    with pytest.raises(SamplerError, match=message):
        scheduler_run(scheduler, rows, None)
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_scheduler_in_the_wrong_state_is_refused() -> None:
    with pytest.raises(SamplerError, match="set_timesteps was called"):
        scheduler_run(dpm(), 8, None)
    scheduler, _ = begun(dpm(), 8)
    scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))
    with pytest.raises(SamplerError, match="middle or at the end of a run; call its set_timesteps first"):
        scheduler_run(scheduler, 8, None)
    with pytest.raises(ScheduleMismatchError, match="for 7 steps"):
        scheduler_run(begun(dpm(), 8)[0], 7, None)


def test_what_another_thread_draws_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws between two steps of the probe, from the generator that all threads share."""
    scheduler, rows = begun(dpm(), 8)
    drawn: list[torch.Tensor] = []
    step = d.DPMSolverMultistepScheduler.step

    def beside(*given: Any, **named: Any) -> Any:
        thread = threading.Thread(target=lambda: drawn.append(torch.randn(4)))
        thread.start()
        thread.join()
        return step(*given, **named)

    monkeypatch.setattr(d.DPMSolverMultistepScheduler, "step", beside)
    scheduler_run(scheduler, rows, None)
    drawn.append(torch.randn(4))
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn) > rows


def test_schedulers_of_other_kinds_are_refused_in_words() -> None:
    scheduler, rows = begun(d.DDPMWuerstchenScheduler(), 8)
    with pytest.raises(SamplerError, match=r"this DDPMWuerstchenScheduler .*IndexError") as refused:
        scheduler_run(scheduler, rows, None)
    assert isinstance(refused.value.__cause__, IndexError)


def test_all_training_timesteps_may_be_asked_for() -> None:
    scheduler = d.DDIMScheduler(num_train_timesteps=12, clip_sample=False)
    with pytest.raises(SamplerError, match="no timesteps yet"):
        scheduler_run(scheduler, 12, None)
    scheduler.set_timesteps(12)
    assert len(scheduler_run(scheduler, 12, None).table.weights) == 12


def test_a_scheduler_that_may_be_written_unseen_is_read_in_every_run() -> None:
    known = KnownSamplers(lambda asked, left_out: 6)
    with torch.inference_mode():
        scheduler, _ = begun(dpm(), 6)
    before = known.of(scheduler, None)
    assert known.of(scheduler, None) is not before


def test_a_table_is_found_again_until_the_scheduler_changes() -> None:
    known, (scheduler, _) = KnownSamplers(lambda asked, left_out: 6), begun(dpm(), 6)
    found = known.of(scheduler, None)
    assert known.of(scheduler, None) is found
    scheduler.set_timesteps(6)
    assert known.of(scheduler, None) is not found
    found = known.of(scheduler, None)
    scheduler.timesteps += 0  # written to
    assert known.of(scheduler, None) is not found
    found = known.of(scheduler, None)
    scheduler.register_to_config(solver_order=3)
    scheduler.set_timesteps(6)
    assert known.of(scheduler, None).table.depth == found.table.depth + 1
