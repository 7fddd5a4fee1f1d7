"""A run as one graph, on the double of CUDA: the bits of a run that goes step by step, whatever happened in between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.execute import whole_run_stream
from harmonica_rt.schedule import Schedule
from tests import tiny
from tests.cuda_double import CudaDouble
from tests.execute.on_streams import allocate, on_device
from tests.execute.test_graph_replay import compiled_with
from tests.models import random_schedule
from tests.sampling.loops import conditioned
from tests.stand_in import StandInPool
from tests.tiers import member

pytestmark = pytest.mark.usefixtures("cuda")

STEPS = 5
FIRST = 2  # runs that go step by step, in which all programs are recorded

Schedulers = dict[str, Callable[[], Any]]
SCHEDULERS: Schedulers = {
    "DDIM": lambda: d.DDIMScheduler(clip_sample=False),
    "DPM++": d.DPMSolverMultistepScheduler,
    "Euler": d.EulerDiscreteScheduler,
}


def scheduler(name: str = "DDIM", steps: int = STEPS) -> Any:
    made = SCHEDULERS[name]()
    made.set_timesteps(steps)
    return made


class Case:
    """A compiled model that records graphs, and one that runs its steps launch by launch.

    Args:
        lowering: of both.
        schedule: what to reuse; at random by default.
        pool: records the graphs.
    """

    def __init__(
        self, lowering: str = "plain", schedule: Schedule | None = None, pool: StandInPool | None = None
    ) -> None:
        self.model = on_device(conditioned())
        self.schedule = schedule or random_schedule(self.model, STEPS, seed=2)
        self.pool = pool or StandInPool()
        self.compiled = compiled_with(self.model, self.schedule, self.pool, lowering=lowering)
        self.plain = hrt.compile(self.model, self.schedule, lowering=lowering, graphs="off", strict=True)
        self.exact = lowering == "plain"
        self._seen = 0

    def sample(self, model: Any, request: int, given: Any, **options: Any) -> torch.Tensor:
        """One run, for latents and a prompt of the request's own."""
        generator = torch.Generator().manual_seed(request)
        latents = torch.randn(2, 4, 8, generator=generator)
        prompt = torch.randn(4 if "guidance_scale" in options else 2, 3, generator=generator)
        found: torch.Tensor = model.sample(latents, given, prompt=prompt, **{"model_timestep": thousandths, **options})
        return found

    def agree(self, request: int, given: Any, **options: Any) -> bool:
        """Whether both give the same for a request."""
        found, expected = (self.sample(model, request, given, **options) for model in (self.compiled, self.plain))
        return torch.equal(found, expected) if self.exact else torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    def replays(self) -> int:
        """Graphs that were replayed since this was last called."""
        before, self._seen = self._seen, self.pool.replayed
        return self._seen - before


def thousandths(timesteps: torch.Tensor) -> torch.Tensor:
    return (timesteps / 1000).float()


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}], ids=["unguided", "guided"])
def test_it_gives_the_bits_of_a_run_step_by_step(case: Case, name: str, options: dict[str, Any]) -> None:
    given = scheduler(name)
    for request in range(6):
        assert case.agree(request, given, **options)
        assert (case.replays() == 1) == (request >= FIRST)  # before: one per step
    assert case.compiled.stats is not None
    assert case.plain.stats == case.compiled.stats


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_a_run_is_recorded_once_all_its_steps_are_graphs(lowering: str) -> None:
    case, given = Case(lowering), scheduler()
    recorded, replayed = [], []
    for request in range(6):
        assert case.agree(request, given)
        recorded.append(case.pool.recorded)
        replayed.append(case.replays())
    assert recorded[-1] == recorded[-2] == recorded[-3]
    assert replayed[-2:] == [{"plain": 1, "fused": 2}[lowering]] * 2  # with the prologue
    (runtime,) = case.compiled.plans.values()
    assert len(runtime.arenas.graphs[0]) == recorded[-1]


def test_other_guidance_timesteps_and_weights_go_through_the_same_graph(case: Case) -> None:
    given, other = scheduler(), scheduler("DDIM", 50)
    other.timesteps = other.timesteps[20 : 20 + STEPS]
    for request in range(4):
        assert case.agree(request, given, guidance_scale=2.0)
    recorded = case.pool.recorded
    for request in range(3):
        assert case.agree(request, given, guidance_scale=2.0 + request)
        assert case.agree(request, other, guidance_scale=2.0)
    assert case.pool.recorded == recorded


def test_a_run_that_begins_later_has_a_graph_of_its_own() -> None:
    model = conditioned()
    case = Case(schedule=Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model)))
    given = scheduler()
    for request in range(4):
        for begin in (0, 1, 2):  # the schedule reuses in step 1, so that a run from there has to catch up
            assert case.agree(request, given, begin_index=begin)
    case.replays()
    for begin in (0, 1, 2):
        assert case.agree(9, given, begin_index=begin)
    assert case.replays() == 3
    assert case.compiled.stats == case.plain.stats


def test_only_so_many_kinds_of_run_are_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_run_stream, "MAX_SAMPLERS", 2)
    given = scheduler()
    for request in range(3):
        for begin in (0, 1, 2, 3):
            assert case.agree(request, given, begin_index=begin)
    (runtime,) = case.compiled.plans.values()
    (memory,) = (held.graphed for held in runtime.arenas._held)
    assert memory is not None
    assert len(memory.samplers) == 2
    programs = runtime.lowered.plan.programs_with_addresses
    assert len(memory.graphs) <= programs + 2


def test_long_runs_go_step_by_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_run_stream, "MAX_STEPS", STEPS - 1)
    given = scheduler()
    for request in range(5):
        assert case.agree(request, given)
    assert case.replays() > STEPS


CHANGES = [
    member(lowering, change, id=f"{lowering}-{change}", always=(lowering == "plain") == (change != "replaced"))
    for lowering in ("plain", "fused")
    for change in ("in place", "moved", "replaced", "a fact", "and back")
]


class TestChangesBetweenRuns:
    """The run is launched first and the model looked at after it: a run of a changed model is done again."""

    @pytest.mark.parametrize(("lowering", "change"), CHANGES)
    def test_it_is_seen(self, lowering: str, change: str) -> None:
        case, given = Case(lowering), scheduler()
        linear: Any = case.model.get_submodule("time")
        truth = hrt.reference(case.model, case.schedule)  # which looks at the model before every step
        activation: Any = nn.LeakyReLU(0.3)
        case.model.get_submodule("blocks.0.mlp")[1] = activation  # type: ignore[index,operator]
        for request in range(4):
            assert case.agree(request, given)
        for request in range(3):
            with torch.no_grad():
                if change == "in place":
                    linear.weight.mul_(2)
                elif change == "moved":
                    linear.weight.data = linear.weight.data.clone() * 2
                elif change == "replaced":
                    linear.weight = nn.Parameter(linear.weight * 2, requires_grad=False)
                elif change == "a fact":
                    activation.negative_slope = 0.1 * request
                else:
                    activation.negative_slope = 0.1 * (request % 2)
            for again in range(3):
                found, expected = (case.sample(each, 10 * request + again, given) for each in (case.compiled, truth))
                assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_offload_between_runs(self, case: Case, cuda: CudaDouble) -> None:
        given = scheduler()
        for request in range(4):
            assert case.agree(request, given)
        for request in range(6):
            for parameter in case.model.parameters():
                parameter.data = parameter.data.clone()
            cuda.empty_cache()
            assert case.agree(request, given)

    def test_a_change_that_another_thread_makes_meanwhile(self, case: Case) -> None:
        """The state after the run differs from that before, so it is done again."""
        given = scheduler()
        for request in range(4):
            assert case.agree(request, given)
        engine = case.compiled._planned
        look, linear = engine.watch.look, case.model.get_submodule("time")
        before, replays = case.sample(case.plain, 7, given), case.replays()

        def look_late() -> Any:
            engine.watch.look = look  # type: ignore[method-assign]
            with torch.no_grad():
                linear.weight.mul_(2)  # type: ignore[operator,union-attr]
            return look()

        engine.watch.look = look_late  # type: ignore[method-assign]
        found = case.sample(case.compiled, 7, given)
        assert torch.equal(found, case.sample(case.plain, 7, given))
        assert not torch.equal(found, before)
        assert replays > 0
        assert case.replays() == 2  # the run was done twice


def test_results_stay_and_two_streams_take_turns(case: Case, cuda: CudaDouble) -> None:
    given = scheduler()
    expected = [case.sample(case.plain, request, given) for request in range(8)]
    cuda.synchronize()
    streams, got = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for request in range(8):
        with torch.cuda.stream(streams[request % 2]):
            got.append(case.sample(case.compiled, request, given))
        allocate(streams[1 - request % 2])
    cuda.synchronize()
    assert all(map(torch.equal, got, expected))


def test_the_host_waits_for_nothing_in_a_run(case: Case, cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    given = scheduler()
    for request in range(5):
        case.sample(case.compiled, request, given, model_timestep=None)
    expected = case.sample(case.plain, 5, given, model_timestep=None)
    cuda.synchronize()
    before, waits = len(cuda.calls), []
    with monkeypatch.context() as patched:
        patched.setattr(cuda.queue, "run_until", lambda last: waits.append(last))
        found = case.sample(case.compiled, 5, given, model_timestep=None)
    assert waits == []
    assert cuda.calls[before:].count("replay") == 1
    assert torch.equal(found, expected)


def test_runs_in_inference_mode_and_without_alternate(case: Case) -> None:
    given = scheduler()
    for request in range(7):
        expected = case.sample(case.plain, request, given)
        with torch.inference_mode(request % 2 == 0):
            assert torch.equal(case.sample(case.compiled, request, given), expected)
        assert (case.replays() == 1) == (request >= FIRST)


class Counting(nn.Module):
    """A `Conditioned` whose graph depends on a value of its request: how many rows of the prompt count."""

    def __init__(self) -> None:
        super().__init__()
        inner = conditioned()
        self.blocks, self.time, self.text = inner.blocks, inner.time, inner.text

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        used = prompt[:, : int(count.sum())].mean(1)
        scale = (self.time(timestep.to(latents.dtype)[:, None]) + self.text(used))[:, None]
        for block in self.blocks:
            latents = block(latents, scale)
        return latents


def test_requests_whose_values_need_other_plans() -> None:
    model = on_device(Counting().eval())
    schedule = random_schedule(model, STEPS, seed=2)
    pool, given = StandInPool(), scheduler()
    compiled = compiled_with(model, schedule, pool)
    truth = hrt.compile(model, schedule, lowering="plain", graphs="off", strict=True)
    for request in range(10):
        generator = torch.Generator().manual_seed(request)
        latents, prompt = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 4, 3, generator=generator)
        count = torch.tensor([1, request % 2])
        before = pool.replayed
        found, expected = (
            each.sample(latents, given, prompt=prompt, count=count, model_timestep=thousandths)
            for each in (compiled, truth)
        )
        assert torch.equal(found, expected)
    assert len(compiled.plans) == 2
    assert pool.replayed == before + 1


def test_calls_by_hand_and_runs_alternate(case: Case) -> None:
    """A step graph and the graph of a run share slots and inputs; neither may leave anything to the other."""
    given = scheduler()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(2, 3, generator=generator)
    for request in range(5):
        assert case.agree(request, given)
        case.compiled.reset(), case.plain.reset()
        for step in range(STEPS):
            latents, timestep = torch.randn(2, 4, 8, generator=generator), torch.full((2,), 0.9 - step / 10)
            timestep = timestep[:1].expand(2)
            assert torch.equal(case.compiled(latents, timestep, prompt), case.plain(latents, timestep, prompt))
    assert len(case.compiled.plans) == 1


def test_what_cannot_be_recorded_goes_step_by_step_and_says_why(case: Case) -> None:
    given = scheduler()
    for request in range(FIRST):
        assert case.agree(request, given)
    case.pool._refuse = True
    for request in range(3):
        assert case.agree(request, given)
    assert case.compiled.report().graphs is not None
    assert "it cannot be recorded: operation not permitted" in str(case.compiled.report())
    case.pool._refuse = False
    case.replays()
    assert case.agree(5, given)
    assert case.replays() == STEPS


def test_another_thread_warms_up_a_run_itself(case: Case) -> None:
    given = scheduler()
    for request in range(FIRST):
        assert case.agree(request, given)
    found: list[torch.Tensor] = []
    (runtime,) = case.compiled.plans.values()
    graphs = runtime.arenas.graphs[0]
    thread = threading.Thread(target=lambda: found.append(len(graphs._warm.keys)))
    thread.start(), thread.join()
    assert found == [0]
    graphs._warm.keys.clear()  # as another thread sees it
    warmed = case.pool.warmed
    assert case.agree(3, given)
    assert case.pool.warmed == warmed + 1
    recorded = case.pool.recorded
    assert case.agree(4, given)
    assert case.pool.recorded == recorded + 1


@pytest.mark.parametrize("seconds", [0.5, 2.0], ids=["faster", "slower"])
def test_a_run_is_a_graph_only_where_its_steps_are(seconds: float) -> None:
    model = conditioned()
    schedule = Schedule.all_compute(steps=STEPS, sites=hrt.find_sites(model))
    pool = StandInPool([1.0] * 3 + [seconds] * 3)
    case = Case(schedule=schedule, pool=pool)
    case.compiled = compiled_with(case.model, schedule, pool, measured=True)
    given = scheduler()
    for request in range(4):
        assert case.agree(request, given)
    (runtime,) = case.compiled.plans.values()
    assert len(runtime.arenas.graphs[0]) == (2 if seconds < 1 else 0)


@pytest.mark.parametrize(
    "lowering", [member("plain", id="plain", always=False), member("fused", id="fused", always=True)]
)
def test_a_dit_with_guidance(lowering: str) -> None:
    model = on_device(tiny.dit().transformer)
    schedule = random_schedule(model, STEPS, seed=2)
    compiled: CompiledModel = compiled_with(model, schedule, StandInPool(), lowering=lowering)
    plain, given = hrt.compile(model, schedule, lowering=lowering, graphs="off", strict=True), scheduler()
    for request in range(5):
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(request))
        labels = torch.tensor([request, request + 1, 1000, 1000])
        found, expected = (
            each.sample(latents, given, class_labels=labels, guidance_scale=2.0, conditional_first=True)
            for each in (compiled, plain)
        )
        assert torch.equal(found, expected) or (lowering == "fused" and torch.allclose(found, expected, atol=1e-4))


def test_a_run_with_weights_is_one_graph_unless_it_lacks_history() -> None:
    model = on_device(conditioned())
    weights = np.ones((STEPS, 2)) * [1.5, -0.5]
    weights[1] = [1.0, 0.0]
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model)).with_weights(weights)
    case, given = Case(schedule=schedule), scheduler()
    for request in range(6):
        assert case.agree(request, given)
        assert (case.replays() == 1) == (request >= FIRST)
    for request in range(6):  # from step 1 on: steps 1 and 3 lack values that a weighted sum takes
        assert case.agree(request, given, begin_index=1)
        assert case.replays() > 1
        assert case.compiled.report().last_catch_ups == (1, 3)


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_each_number_of_steps_has_a_graph_of_its_own(lowering: str) -> None:
    case = Case(lowering)
    # all plans share the pool, so its bytes count once per plan
    how = {"lowering": lowering, "on_other_steps": "resample", "max_plan_bytes": 2**30}
    case.compiled = compiled_with(case.model, case.schedule, case.pool, **how)
    case.plain = hrt.compile(case.model, case.schedule, graphs="off", strict=True, **how)
    given = {steps: scheduler("DDIM", steps) for steps in (STEPS, 8, 3)}
    for request in range(4):
        for each in given.values():
            assert case.agree(request, each)
    assert len({id(runtime.lowered.plan.captured.graph) for runtime in case.compiled.plans.values()}) == 1
    recorded = case.pool.recorded
    case.replays()
    for each in given.values():
        assert case.agree(9, each)
        assert case.replays() == {"plain": 1, "fused": 2}[lowering]  # with the prologue
    assert case.pool.recorded == recorded
    assert case.compiled.stats == case.plain.stats
