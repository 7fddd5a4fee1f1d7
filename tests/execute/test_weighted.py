"""Schedules with weights: reused entries are weighted sums of what was computed before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import harmonica_rt as hrt
from harmonica_rt.errors import ScheduleMismatchError
from harmonica_rt.schedule import Schedule
from tests.execute.test_graph_replay import close, compiled_with
from tests.models import random_weights, stack, stack_call
from tests.sampling.loops import conditioned
from tests.stand_in import StandInPool

STEPS = 8
MODEL = stack()
SITES = hrt.find_sites(MODEL)


def every_2(weights: list[float]) -> Schedule:
    """Every second step computes; from step 3 on, the others take the two latest values, with weights that vary."""
    varied = [[weight * (1 + step / 10) for weight in weights] for step in range(STEPS)]
    varied[1] = [1.0, 0.0]
    return Schedule.every(2, steps=STEPS, sites=SITES).with_weights(varied)


def run(model: Any, seed: int) -> list[Tensor]:
    model.reset()
    return [model(**stack_call(100 * seed + step)) for step in range(STEPS)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), cur=st.floats(0.1, 0.8), order=st.integers(1, 4), per_site=st.booleans())
def test_plain_equals_the_reference_bit_for_bit(seed: int, cur: float, order: int, per_site: bool) -> None:
    schedule = Schedule.random(cur, steps=STEPS, sites=SITES, seed=seed)
    schedule = random_weights(schedule, order, seed=seed, per_site=per_site)
    compiled = hrt.compile(MODEL, schedule, lowering="plain", strict=True, debug=True)
    reference = hrt.reference(MODEL, schedule)
    for each in range(2):
        assert all(map(torch.equal, run(compiled, each), run(reference, each)))


@pytest.mark.parametrize("lowering", ["hoisted", "fused", "inductor"])
def test_other_lowerings_equal_it_up_to_rounding(lowering: str) -> None:
    schedule = random_weights(Schedule.random(0.5, steps=STEPS, sites=SITES, seed=1), 3, seed=1)
    report = hrt.verify(MODEL, schedule, calls=[stack_call(step) for step in range(STEPS)], lowering=lowering)
    assert report.ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_precision(dtype: torch.dtype) -> None:
    model = stack().to(dtype)
    calls = [{n: v.to(dtype) for n, v in stack_call(step).items()} for step in range(STEPS)]
    schedule = random_weights(Schedule.random(0.5, steps=STEPS, sites=SITES, seed=1), 3, seed=1)
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    reference = hrt.reference(model, schedule)
    for call in calls:
        assert torch.equal(compiled(**call), reference(**call))


def test_torch_compile_and_plan_files_keep_weights(tmp_path: Path) -> None:
    schedule = random_weights(Schedule.random(0.5, steps=STEPS, sites=SITES, seed=1), 3, seed=1)
    expected = run(hrt.reference(MODEL, schedule), 0)
    compiled = hrt.compile(MODEL, schedule, lowering="plain", strict=True)
    run(compiled, 0)
    compiled.save(tmp_path / "plan.json")
    assert all(map(torch.equal, run(hrt.load(tmp_path / "plan.json", MODEL), 0), expected))
    options = {"schedule": schedule, "lowering": "plain"}
    by_dynamo = torch.compile(MODEL, backend="harmonica", options=options)
    with torch.no_grad():
        got = [by_dynamo(**stack_call(step)) for step in range(STEPS)]
    assert all(map(torch.equal, got, expected))


def test_the_sum_is_taken_of_what_was_computed() -> None:
    """Against sums written down here: the first site alone is reused, by weights 2 and -3, in step 3."""
    kept: list[Tensor] = []
    site = MODEL.get_submodule(SITES[0])
    mask = np.ones((4, len(SITES)), bool)
    mask[3, 0] = False
    weights = np.ones((4, 3)) * [2.0, 0.0, -3.0]
    compiled = hrt.compile(MODEL, Schedule.from_array(mask, sites=SITES).with_weights(weights), lowering="plain")
    hook = site.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    for step in range(3):
        MODEL(**stack_call(step))
    hook.remove()
    hook = site.register_forward_hook(lambda module, args, output: kept[2] * 2.0 + kept[0] * -3.0)
    expected = MODEL(**stack_call(3))
    hook.remove()
    got = [compiled(**stack_call(step)) for step in range(4)][3]
    assert torch.equal(got, expected)


def test_weights_make_no_programs() -> None:
    plain = hrt.compile(MODEL, Schedule.every(2, steps=STEPS, sites=SITES), strict=True)
    weighted = hrt.compile(MODEL, every_2([1.5, -0.5]), strict=True)
    for compiled in (plain, weighted):
        run(compiled, 0)
    assert weighted.report().plans[0].programs == plain.report().plans[0].programs
    assert weighted.report().plans[0].theoretical_speedup == plain.report().plans[0].theoretical_speedup


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_graphs_take_the_weights_of_their_step(lowering: str) -> None:
    model, pool = stack(), StandInPool()
    schedule = every_2([1.5, -0.5])
    compiled, reference = compiled_with(model, schedule, pool, lowering=lowering), hrt.reference(model, schedule)
    for each in range(4):
        assert close(run(compiled, each), run(reference, each))
    assert pool.replayed > 2 * STEPS


def test_a_stream_without_the_history_computes_in_full() -> None:
    """The prompt changes before step 3, which is to take the values of steps 2 and 0; step 5 has 4, but not 2."""
    model = conditioned()
    sites = hrt.find_sites(model)
    weights = np.ones((STEPS, 2)) * [1.5, -0.5]
    weights[1] = [1.0, 0.0]
    schedule = Schedule.every(2, steps=STEPS, sites=sites).with_weights(weights)
    compiled, reference = (hrt.compile(model, schedule, lowering="plain", strict=True), hrt.reference(model, schedule))
    latents, prompts = torch.randn(2, 4, 8), torch.randn(2, 2, 3)
    for step in range(STEPS):
        call = (latents + step, torch.full((2,), 1.0 - step / 10), prompts[int(step >= 3)])
        got = compiled(*call)
        assert torch.equal(got, reference(*call))
        if step in (3, 5):
            assert torch.equal(got, model(*call))
    assert compiled.report().last_catch_ups == (3, 5)


def test_a_value_that_is_no_number_cannot_be_weighted() -> None:
    class Flags(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x > 0

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flags = Flags()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.flags(x)

    schedule = Schedule.every(2, steps=2, sites=["flags"]).with_weights([[1.0], [0.5]])
    compiled = hrt.compile(Masked().eval(), schedule, strict=True)
    with pytest.raises(ScheduleMismatchError, match=r"flags.*bool"):
        compiled(torch.randn(2, 4))


def test_a_site_with_weights_takes_the_values_of_its_steps_after_a_stream_caught_up() -> None:
    """One site catches up at step 2 for the other's sake; its entry at step 3 is plain, but it has weights later."""
    model = stack(depth=1)
    compute = np.array([[1, 1], [0, 1], [0, 0], [0, 0], [1, 1], [0, 1]], dtype=bool)
    weights = np.zeros((6, 2, 2))
    weights[..., 0] = 1
    weights[5, 0] = 2, -1
    schedule = Schedule.from_array(compute, sites=hrt.find_sites(model)).with_weights(weights)
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True)
    reference = hrt.reference(model, schedule)
    for step in range(6):
        call = stack_call(step, batch=1 if step == 1 else 2)  # the stream of two misses step 1
        assert torch.equal(compiled(**call), reference(**call)), step
