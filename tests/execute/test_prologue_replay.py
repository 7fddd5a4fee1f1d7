"""The prologue as a graph, by the stand-in: what it reads lies still, and what it gives is that of the run at hand."""

from __future__ import annotations

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
from tests.models import stack, stack_call
from tests.stand_in import StandInPool
from tests.tiny import random_schedule

STEPS = 5
KEY = tuple(900.0 - 100 * step for step in range(STEPS))


def dit_calls(classes: int, first: float = KEY[0]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(classes)
    return [
        {
            "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
            "timestep": torch.full((2,), int(first - 100 * step)),
            "class_labels": torch.tensor([classes, classes + 1]),
        }
        for step in range(STEPS)
    ]


def run(compiled: Any, calls: list[dict[str, Tensor]], key: tuple[float, ...] | None = KEY) -> list[Tensor]:
    if isinstance(compiled, CompiledModel):
        compiled.reset(key)
    else:
        compiled.reset()
    outputs = [compiled(**{**call, **_request(calls)}) for call in calls]
    return [output if isinstance(output, Tensor) else output.sample for output in outputs]


def _request(calls: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The very tensor in all steps, as a pipeline passes it."""
    return {name: calls[0][name] for name in ("class_labels",) if name in calls[0]}


class Case:
    """A compiled model over the stand-in, beside its reference."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        schedule = random_schedule(model, STEPS, seed=2)
        self.pool = StandInPool()
        self.compiled = compiled_with(model, schedule, self.pool, lowering="fused")
        self.truth = hrt.reference(model, schedule)

    def agree(self, calls: list[dict[str, Tensor]], key: tuple[float, ...] = KEY) -> bool:
        return close(run(self.compiled, calls, key), run(self.truth, calls))

    @property
    def steps_recorded(self) -> int:
        (runtime,) = self.compiled.plans.values()
        return runtime.lowered.plan.programs_with_addresses


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    return Case(tiny.dit().transformer)


def test_it_is_recorded_at_its_second_use_and_replayed_for_other_requests(case: Case) -> None:
    counts = []
    for classes in range(5):
        assert case.agree(dit_calls(classes))
        counts.append(case.pool.recorded)
    # run 0 learns the timesteps, run 1 warms it up, run 2 records it
    assert counts[2:] == [case.steps_recorded + 1] * 3
    assert counts[1] <= case.steps_recorded


def test_other_timesteps_of_one_shape_go_through_the_same_graph(case: Case) -> None:
    other = tuple(value - 50 for value in KEY)
    for classes in range(3):
        assert case.agree(dit_calls(classes))
    recorded = case.pool.recorded
    for classes in range(3):
        assert case.agree(dit_calls(classes, first=other[0]), other)
        assert case.agree(dit_calls(classes))
    assert case.pool.recorded == recorded


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "replaced"])
def test_weights_are_live(case: Case, in_place: bool) -> None:
    for classes in range(3):
        assert case.agree(dit_calls(classes))
    recorded = case.pool.recorded
    linear: Any = case.model.get_submodule("transformer_blocks.0.norm1.linear")
    with torch.no_grad():
        if in_place:
            linear.weight.mul_(2)
        else:
            linear.weight.data = linear.weight.data * 2
    assert case.agree(dit_calls(4))
    assert case.agree(dit_calls(5))
    assert (case.pool.recorded == recorded) == in_place


def test_a_request_swapped_in_mid_run_leaves_the_next_run_right(case: Case) -> None:
    for classes in range(3):
        assert case.agree(dit_calls(classes))
    calls = dit_calls(3)
    case.compiled.reset(KEY), case.truth.reset()
    for step, call in enumerate(calls):
        call["class_labels"] = torch.tensor([7, 8] if step >= 2 else [3, 4])
        assert torch.allclose(case.compiled(**call).sample, case.truth(**call).sample, rtol=1e-5, atol=1e-6)
    assert case.agree(dit_calls(6))


def test_what_cannot_be_batched_is_computed_step_by_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("an operator without a batching rule")

    monkeypatch.setattr(torch, "vmap", refuse)
    for classes in range(4):
        assert case.agree(dit_calls(classes))
    assert case.pool.recorded == case.steps_recorded


def test_a_part_that_lies_on_the_cpu_is_not_recorded_for_another_device() -> None:
    model = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = compiled_with(model, schedule, StandInPool(), lowering="fused")
    run(compiled, [stack_call(step) for step in range(STEPS)])
    (runtime,) = compiled.plans.values()
    part = runtime.lowered.prologue.each.part
    assert obstacle(part, torch.device("cpu")) is None
    assert "lies on the CPU, other values do not" in str(obstacle(part, torch.device("cuda")))


def test_a_failure_after_a_pass_that_was_batched_is_no_missing_rule(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for classes in range(2):
        assert case.agree(dit_calls(classes))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "vmap", fail)
        with pytest.raises(RuntimeError, match="not permitted"):
            run(case.compiled, dit_calls(2))
    assert case.agree(dit_calls(3))  # batched again
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
    assert runtime.lowered.prologue in runtime.arenas.graphs[0].refusals
