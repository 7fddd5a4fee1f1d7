"""Graphs of step programs, on the double of CUDA: static inputs, replay, what is recorded when, what is refused."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.errors import RunError
from harmonica_rt.execute import graph_replay
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.indices import StepIndex
from harmonica_rt.lower.cuda_graph_rules import obstacle
from harmonica_rt.options import CompileOptions
from harmonica_rt.schedule import Schedule
from tests.models import Stack, random_schedule, stack, stack_call
from tests.stand_in import StandInPool, graphs_in

pytestmark = pytest.mark.usefixtures("cuda")

STEPS = 6


def compiled_with(
    model: torch.nn.Module,
    schedule: Schedule,
    pool: StandInPool,
    *,
    lowering: str = "plain",
    measured: bool = False,
    **more: Any,
) -> CompiledModel:
    """A model compiled as `hrt.compile` does, with a pool that counts."""
    graphs = graphs_in(pool, measured=measured)
    options = CompileOptions(lowering=lowering, strict=True, max_plans=4, debug=True, **more)
    engine = PlannedEngine(model, schedule, options, graphs)
    return CompiledModel(model, schedule, engine, verify=False)


def outputs(model: Any, seed: int = 0) -> list[torch.Tensor]:
    """One run; every output kept as it was handed over."""
    model.reset()
    return [model(**stack_call(100 * seed + step)) for step in range(STEPS)]


def close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def model() -> Stack:
    return stack()


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_replayed_runs_equal_the_reference_and_their_outputs_stay(model: Stack, lowering: str) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    pool = StandInPool()
    compiled, truth = compiled_with(model, schedule, pool, lowering=lowering), hrt.reference(model, schedule)
    kept = [(outputs(compiled, seed), outputs(truth, seed)) for seed in range(3)]
    assert all(close(got, expected) for got, expected in kept)
    assert pool.replayed > 0
    (runtime,) = compiled.plans.values()
    of_prologue = {"plain": 0, "fused": 2}[lowering]  # of the request, and of a step that was not foreseen
    programs = runtime.lowered.plan.programs_with_addresses
    assert pool.recorded == len(runtime.arenas.graphs[0]) == programs + of_prologue
    assert f"{pool.recorded} CUDA graphs" in str(compiled.report())


def test_a_program_is_recorded_once_and_replayed_from_then_on(model: Stack) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    pool = StandInPool()
    compiled = compiled_with(model, schedule, pool)
    for _ in range(3):
        outputs(compiled)
    (runtime,) = compiled.plans.values()
    graphs = runtime.lowered.plan.programs_with_addresses
    assert (pool.warmed, pool.recorded, pool.replayed) == (graphs, graphs, 3 * STEPS - graphs)


def test_weights_written_in_place_are_seen_and_weights_replaced_are_recorded_anew(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    pool = StandInPool()
    compiled, truth = compiled_with(model, schedule, pool), hrt.reference(model, schedule)
    outputs(compiled), outputs(compiled)
    recorded = pool.recorded
    weight = model.blocks[0].mlp[0].weight
    weight.data.mul_(2)
    assert close(outputs(compiled), outputs(truth))
    assert pool.recorded == recorded
    weight.data = weight.data * 3
    assert close(outputs(compiled), outputs(truth))
    assert pool.recorded == 2 * recorded


def test_two_streams_have_graphs_of_their_own(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    pool = StandInPool()
    compiled, truth = compiled_with(model, schedule, pool), hrt.reference(model, schedule)
    small, large = [stack_call(s) for s in range(STEPS)], [stack_call(s, tokens=6) for s in range(STEPS)]
    for calls in (small, large, small, large):
        compiled.reset(), truth.reset()
        assert close([compiled(**c) for c in calls], [truth(**c) for c in calls])
    first, second = compiled.plans.values()
    assert len(first.arenas.graphs[0]) == len(second.arenas.graphs[0]) == pool.recorded / 2


@pytest.mark.parametrize(("graph_seconds", "kept"), [(0.5, True), (1.01, True), (1.03, False), (2.0, False)])
def test_a_graph_that_is_slower_is_dropped(model: Stack, graph_seconds: float, kept: bool) -> None:
    schedule = Schedule.all_compute(steps=STEPS, sites=hrt.find_sites(model))
    pool = StandInPool([1.2, 1.0, 1.1, 3.0, graph_seconds, 3.0])
    compiled, truth = compiled_with(model, schedule, pool, measured=True), hrt.reference(model, schedule)
    assert close(outputs(compiled), outputs(truth))
    (runtime,) = compiled.plans.values()
    assert len(runtime.arenas.graphs[0]) == kept
    assert (not runtime.arenas.graphs[0].refusals) == kept
    if not kept:
        assert "a graph is slower" in str(next(iter(runtime.arenas.graphs[0].refusals.values())))


def test_what_cannot_be_recorded_runs_without_and_says_why(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = compiled_with(model, schedule, StandInPool(refuse=True)), hrt.reference(model, schedule)
    for seed in range(2):
        assert close(outputs(compiled, seed), outputs(truth, seed))
    (runtime,) = compiled.plans.values()
    reasons = set(map(str, runtime.arenas.graphs[0].refusals.values()))
    assert compiled.report().graphs.refusals.keys() == reasons
    assert reasons == {"it cannot be recorded: operation not permitted when stream is capturing"}


class Drawing(Stack):
    """Adds noise in every call."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(latents, timestep) + 0.01 * torch.randn_like(latents)


class Waiting(Stack):
    """Takes the rows where the latents are positive, which no one can count ahead."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(latents, timestep) + latents[latents > 0].sum()


@pytest.mark.parametrize(
    ("kind", "reason"), [(Drawing, r"randn_like.*draws random numbers"), (Waiting, r"index.*size that depends")]
)
def test_the_node_that_a_graph_cannot_hold_is_named(kind: type[Stack], reason: str) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    pool = StandInPool()
    compiled = compiled_with(model, Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model)), pool)
    outputs(compiled)
    (runtime,) = compiled.plans.values()
    assert pool.warmed == pool.recorded == 0
    for found in runtime.arenas.graphs[0].refusals.values():
        assert re.search(reason, str(found))


def test_weights_are_cast_anew_in_every_replay(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    pool = StandInPool()
    compiled, truth = compiled_with(model, schedule, pool), hrt.reference(model, schedule)
    seen: list[bool] = []
    record = pool.record
    pool.record = lambda body: (seen.append(torch.is_autocast_cache_enabled()), record(body))[1]  # type: ignore[method-assign]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = outputs(compiled), outputs(truth)
            assert torch.is_autocast_cache_enabled()
        assert all(torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(got, expected, strict=True))
    assert seen == [False] * pool.recorded != []


def test_weights_that_move_in_every_run_are_recorded_no_more(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    pool = StandInPool()
    compiled, truth = compiled_with(model, schedule, pool), hrt.reference(model, schedule)
    weight = model.blocks[0].mlp[0].weight
    for _ in range(graph_replay.MOVES + 2):
        assert close(outputs(compiled), outputs(truth))
        recorded = pool.recorded
        weight.data = weight.data.clone()
    assert close(outputs(compiled), outputs(truth))
    assert pool.recorded == recorded
    assert set(compiled.report().graphs.refusals) == {str(graph_replay.RESTLESS)}
    assert close(outputs(compiled), outputs(truth))  # they stayed
    assert pool.recorded > recorded
    assert not compiled.report().graphs.refusals


class Doubling(Stack):
    """With a number that is made while tracing, and one that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(2.0)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(latents, timestep) * self.factor


def test_a_number_that_was_read_in_recording_is_read_anew_where_it_changed() -> None:
    torch.manual_seed(0)
    model = Doubling().eval()
    schedule = random_schedule(model, STEPS, seed=1)
    pool = StandInPool()
    compiled, truth = compiled_with(model, schedule, pool), hrt.reference(model, schedule)
    outputs(compiled), outputs(compiled)
    recorded = pool.recorded
    model.factor.mul_(3.0)
    assert close(outputs(compiled), outputs(truth))
    assert pool.recorded == 2 * recorded
    (runtime,) = compiled.plans.values()
    step = runtime.lowered.program(StepIndex(0)).step
    node = next(node for node in step.graph.nodes if node.name in step.constants)
    other = next(node for node in step.graph.nodes if node.op == "call_function")
    other.meta["val"] = other.meta["val"].to("meta")  # another device
    assert str(obstacle(step)) != f"{node.name} ({node.target}) lies on the CPU, while other values do not"


def test_weights_made_of_other_tensors_are_not_recorded() -> None:
    model = stack()
    wrapped = TwoTensor(torch.randn(8, 8), torch.randn(8, 8))
    model.blocks[0].attn.weight = torch.nn.Parameter(wrapped, requires_grad=False)
    pool = StandInPool()
    compiled = compiled_with(model, random_schedule(model, STEPS, seed=1), pool)
    for _ in range(3):
        outputs(compiled)
    assert pool.warmed == pool.recorded == 0


def test_streams_find_their_own_memory_again(model: Stack) -> None:
    compiled = compiled_with(model, random_schedule(model, STEPS, seed=1), StandInPool())
    outputs(compiled)
    (runtime,) = compiled.plans.values()
    runtime.begin_run()
    first, second, third = (runtime.new_stream().buffers for _ in range(3))
    for _ in range(2):
        runtime.begin_run()
        assert runtime.new_stream().buffers is first
    runtime.begin_run()
    assert [runtime.new_stream().buffers for _ in range(3)] == [first, second, third]


def test_a_compiled_model_is_freed_with_its_memory(model: Stack) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True)
    outputs(compiled)
    (runtime,) = compiled.plans.values()
    held = weakref.ref(runtime)
    gc.disable()
    try:
        del compiled, runtime
        assert held() is None
    finally:
        gc.enable()


def test_a_plan_lets_go_of_weights_that_were_replaced(model: Stack) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True)
    outputs(compiled)
    compiled.reset()
    compiled(**stack_call(0, tokens=6))  # a plan that is not used again
    old = weakref.ref(model.blocks[0].attn.weight)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    outputs(compiled)
    gc.collect()
    assert old() is None


class TestTimesteps:
    """Where values are not looked at, a run of known scheduler timesteps is foreseen, and held to that when it ends."""

    KEY = tuple(float(step) for step in range(STEPS))

    def run(self, compiled: CompiledModel, first: int = 0, key: tuple[float, ...] | None = KEY) -> list[torch.Tensor]:
        compiled.reset(key)
        return [compiled(**stack_call(first + step)) for step in range(STEPS)]

    def test_a_wrong_timestep_is_raised_at_the_end_and_the_next_run_is_right(self, model: Stack) -> None:
        schedule = random_schedule(model, STEPS, seed=1)
        compiled, truth = (
            compiled_with(model, schedule, StandInPool(), lowering="fused"),
            hrt.reference(model, schedule),
        )
        assert close(self.run(compiled), outputs(truth))
        assert close(self.run(compiled), outputs(truth))
        with pytest.raises(RunError, match="other timesteps than in the previous run"):
            self.run(compiled, first=1)
        truth.reset()
        assert close(self.run(compiled, first=1), [truth(**stack_call(1 + step)) for step in range(STEPS)])

    def test_other_scheduler_timesteps_are_another_forecast(self, model: Stack) -> None:
        schedule = random_schedule(model, STEPS, seed=1)
        compiled = compiled_with(model, schedule, StandInPool(), lowering="fused")
        first = self.run(compiled)
        other = self.run(compiled, first=1, key=(9.0,) * STEPS)
        assert close(self.run(compiled), first)
        assert close(self.run(compiled, first=1, key=(9.0,) * STEPS), other)

    def test_without_a_scheduler_nothing_is_foreseen(self, model: Stack) -> None:
        schedule = random_schedule(model, STEPS, seed=1)
        compiled, truth = (
            compiled_with(model, schedule, StandInPool(), lowering="fused"),
            hrt.reference(model, schedule),
        )
        self.run(compiled, key=None)
        truth.reset()
        assert close(self.run(compiled, 1, key=None), [truth(**stack_call(1 + step)) for step in range(STEPS)])
