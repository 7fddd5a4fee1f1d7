"""A run of a model by itself that begins anew without `reset()` is caught by its timesteps, and no other run is."""

from __future__ import annotations

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import RunError
from tests.models import stack, stack_call

FORWARD = {
    "falling": [999.0, 666.0, 333.0, 0.0],
    "rising": [0.0, 0.25, 0.5, 1.0],
    "repeated": [999.0, 999.0, 500.0, 500.0],
    "back by rounding": [999.0, 666.0, 666.0001, 333.0],
    "back and forth a little": [1.0, 0.6, 0.7, 0.2],
    "uneven": [1.0, 0.99, 0.5, 0.1],
}
BEGINS_ANEW = {
    "at once": [999.0, 900.0, 999.0],
    "later": [999.0, 900.0, 800.0, 999.0],
    "rising": [0.0, 0.5, 0.0],
    "with other steps": [999.0, 900.0, 800.0, 950.0],
}


def run(timesteps: list[float]) -> None:
    model = stack()
    compiled = hrt.compile(model, Schedule.every(2, steps=8, sites=hrt.find_sites(model)))
    for step, timestep in enumerate(timesteps):
        compiled(stack_call(step)["latents"], torch.full((2,), timestep))
    assert compiled.report().last_calls == len(timesteps)


@pytest.mark.parametrize("kind", FORWARD)
def test_runs_of_all_samplers_pass(kind: str) -> None:
    run(FORWARD[kind])


@pytest.mark.parametrize("kind", BEGINS_ANEW)
def test_a_new_run_is_an_error(kind: str) -> None:
    with pytest.raises(RunError, match=f"step {len(BEGINS_ANEW[kind]) - 1} came with timestep"):
        run(BEGINS_ANEW[kind])
