"""CUDA graphs on the device: the same facts that the stand-in is held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.errors import RunError
from tests.models import Stack, stack, stack_call
from tests.tiny import families, random_schedule

pytestmark = pytest.mark.gpu

STEPS = 6
KEY = tuple(float(step) for step in range(STEPS))


@pytest.fixture
def model() -> Stack:
    return stack(width=64).cuda()


def call_of(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in stack_call(step, width=64).items()}


def run(compiled: Any, first: int = 0) -> list[torch.Tensor]:
    """One run, as if a scheduler drove it; every output kept as it was handed over."""
    compiled.reset(KEY)
    return [compiled(**call_of(first + step)) for step in range(STEPS)]


def close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("lowering", ["plain", "fused", "inductor"])
def test_replayed_runs_equal_the_reference_and_their_outputs_stay(model: Stack, lowering: str) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = hrt.compile(model, schedule, lowering=lowering, graphs="on", strict=True, debug=True)
    truth = hrt.reference(model, schedule)
    kept = [(run(compiled), run(truth)) for _ in range(3)]
    assert all(close(got, expected) for got, expected in kept)
    report = compiled.report()
    assert report.graphs is not None
    assert report.graphs.recorded == report.plans[0].programs_with_addresses
    assert not report.graphs.refusals
    assert report.graphs.static_bytes > 0


def test_weights_written_in_place_and_weights_replaced(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    run(compiled), run(compiled)
    weight = model.blocks[0].mlp[0].weight
    weight.data.mul_(2)
    assert close(run(compiled), run(truth))
    weight.data = weight.data * 3
    assert close(run(compiled), run(truth))


def test_no_step_of_a_foreseen_run_waits_for_the_device(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = hrt.compile(model, schedule, graphs="on", strict=True)
    run(compiled), run(compiled)
    calls = [call_of(step) for step in range(STEPS)]
    compiled.reset(KEY)
    compiled(**calls[0]), compiled(**calls[1])  # conditioning is told from what stays the same between these
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls[2:-1]:
            compiled(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled(**calls[-1])


def test_a_wrong_timestep_is_raised_at_the_end_and_the_next_run_is_right(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    run(compiled), run(compiled)
    with pytest.raises(RunError, match="other timesteps than the last one"):
        run(compiled, first=1)
    assert close(run(compiled, first=1), run(truth, first=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lowering", ["fused", "inductor"])
@pytest.mark.parametrize("name", list(families()))
def test_pipelines_pass_parity(name: str, lowering: str, dtype: torch.dtype) -> None:
    family = families()[name]
    torch.manual_seed(0)
    pipeline = family.build().to("cuda", dtype)
    pipeline.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipeline.transformer, STEPS)
    arguments = {
        key: value.to("cuda", dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in family.guided.items()
    }
    report = hrt.verify(pipeline, schedule, lowering=lowering, num_inference_steps=STEPS, **arguments)
    assert report.ok


def test_the_backend_of_torch_compile(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = torch.compile(model, backend="harmonica", options={"schedule": schedule, "graphs": "on"}, fullgraph=True)
    session, truth = None, hrt.reference(model, schedule)
    for _ in range(3):
        with torch.no_grad():
            outputs = []
            for step in range(STEPS):
                outputs.append(compiled(**call_of(step)))
        session = session or hrt.attach(compiled)
        session.reset()
        assert close(outputs, run(truth))
