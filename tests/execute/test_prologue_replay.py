"""The prologue as a graph, on the double of CUDA: what it reads lies still, what it gives is of the run at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.lower.cuda_graph_rules import obstacle
from harmonica_rt.schedule import Schedule
from tests import tiny
from tests.execute.test_graph_replay import close, compiled_with
from tests.models import random_schedule, stack, stack_call
from tests.sampling.loops import conditioned
from tests.stand_in import StandInPool

pytestmark = pytest.mark.usefixtures("cuda")

STEPS = 5
KEY = tuple(900.0 - 100 * step for step in range(STEPS))


Calls = list[dict[str, Tensor]]


def dit_calls(request: int, first: float = KEY[0]) -> Calls:
    """A run of a DiT for two classes."""
    generator = torch.Generator().manual_seed(request)
    return [
        {
            "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
            "timestep": torch.full((2,), int(first - 100 * step)),
            "class_labels": torch.tensor([request, request + 1]),
        }
        for step in range(STEPS)
    ]


def prompted_calls(request: int, first: float = KEY[0]) -> Calls:
    """A run of a `Conditioned` model for one prompt."""
    generator = torch.Generator().manual_seed(request)
    prompt = torch.randn(2, 3, generator=generator)
    return [
        {
            "latents": torch.randn(2, 4, 8, generator=generator),
            "timestep": torch.full((2,), (first - 100 * step) / 1000),
            "prompt": prompt,
        }
        for step in range(STEPS)
    ]


def run(compiled: Any, calls: Calls, key: tuple[float, ...] | None = KEY) -> list[Tensor]:
    if isinstance(compiled, CompiledModel):
        compiled.reset(key)
    else:
        compiled.reset()
    outputs = [compiled(**{**call, **_request(calls)}) for call in calls]
    return [output if isinstance(output, Tensor) else output.sample for output in outputs]


def _request(calls: Calls) -> dict[str, Tensor]:
    """The very tensor in all steps, as a pipeline passes it."""
    return {name: calls[0][name] for name in ("class_labels", "prompt") if name in calls[0]}


class Case:
    """A compiled model with a pool of the stand-in, beside its reference."""

    def __init__(self, model: nn.Module, calls_of: Callable[..., Calls]) -> None:
        self.model = model
        self.calls_of = calls_of
        schedule = random_schedule(model, STEPS, seed=2)
        self.pool = StandInPool()
        self.compiled = compiled_with(model, schedule, self.pool, lowering="fused")
        self.truth = hrt.reference(model, schedule)

    def agree(self, request: int, key: tuple[float, ...] = KEY) -> bool:
        """Whether a run for a request gives what the reference gives."""
        calls = self.calls_of(request, key[0])
        return close(run(self.compiled, calls, key), run(self.truth, calls))

    @property
    def steps_recorded(self) -> int:
        (runtime,) = self.compiled.plans.values()
        return runtime.lowered.plan.programs_with_addresses


@pytest.fixture
def case() -> Case:
    return Case(conditioned(), prompted_calls)


@pytest.mark.parametrize("family", ["conditioned", "dit"])
def test_it_is_recorded_at_its_second_use_and_replayed_for_other_requests(case: Case, family: str) -> None:
    if family == "dit":
        case = Case(tiny.dit().transformer, dit_calls)
    counts = []
    for request in range(5):
        assert case.agree(request)
        counts.append(case.pool.recorded)
    # run 0 learns the timesteps and records the prologue of a step; run 1 warms up that of a run, run 2 records it
    assert counts[2:] == [case.steps_recorded + 2] * 3
    assert counts[1] <= case.steps_recorded + 1


def test_other_timesteps_of_one_shape_go_through_the_same_graph(case: Case) -> None:
    other = tuple(value - 50 for value in KEY)
    for request in range(3):
        assert case.agree(request)
    assert case.agree(3, other)  # not foreseen
    recorded = case.pool.recorded
    for request in range(3):
        assert case.agree(request, other)
        assert case.agree(request)
    assert case.pool.recorded == recorded


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "replaced"])
def test_weights_are_live(case: Case, in_place: bool) -> None:
    for request in range(3):
        assert case.agree(request)
    recorded = case.pool.recorded
    linear: Any = case.model.get_submodule("time")
    with torch.no_grad():
        if in_place:
            linear.weight.mul_(2)
        else:
            linear.weight.data = linear.weight.data * 2
    assert case.agree(4)
    assert case.agree(5)
    assert (case.pool.recorded == recorded) == in_place


def test_a_request_swapped_in_mid_run_leaves_the_next_run_right(case: Case) -> None:
    for request in range(3):
        assert case.agree(request)
    calls = prompted_calls(3)
    swapped = torch.ones(2, 3)
    case.compiled.reset(KEY), case.truth.reset()
    for step, call in enumerate(calls):
        call["prompt"] = swapped if step >= 2 else calls[0]["prompt"]
        assert torch.allclose(case.compiled(**call), case.truth(**call), rtol=1e-5, atol=1e-6)
    assert case.agree(6)


def test_what_cannot_be_batched_is_computed_step_by_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("an operator without a batching rule")

    monkeypatch.setattr(torch, "vmap", refuse)
    for request in range(4):
        assert case.agree(request)
    assert case.pool.recorded == case.steps_recorded + 2  # the prologue of a step, and that of a request


def test_a_part_that_lies_on_the_cpu_is_not_recorded_for_another_device() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = compiled_with(model, schedule, StandInPool(), lowering="fused")
    run(compiled, [stack_call(step) for step in range(STEPS)])
    (runtime,) = compiled.plans.values()
    part = runtime.lowered.prologue.each.part
    assert obstacle(part, torch.device("cpu")) is None
    assert "lies on the CPU, while other values do not" in str(obstacle(part, torch.device("cuda")))


def test_a_failure_after_a_pass_that_was_batched_is_no_missing_rule(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for request in range(2):
        assert case.agree(request)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "vmap", fail)
        with pytest.raises(RuntimeError, match="not permitted"):
            run(case.compiled, prompted_calls(2))
    assert case.agree(3)  # batched again
    (runtime,) = case.compiled.plans.values()
    assert runtime.lowered.prologue.batches


def test_a_refused_recording_runs_plainly_and_says_so() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = compiled_with(model, schedule, StandInPool(refuse=True), lowering="fused")
    truth, calls = hrt.reference(model, schedule), [stack_call(step) for step in range(STEPS)]
    for _ in range(4):
        assert close(run(compiled, calls), run(truth, calls))
    (runtime,) = compiled.plans.values()
    prologues = ((runtime.lowered.prologue, what) for what in ("request", "step", "run"))
    assert any(prologue in runtime.arenas.graphs[0].refusals for prologue in prologues)
