"""CUDA graphs on the device: the same facts that the stand-in is held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.errors import RunError
from harmonica_rt.execute.cuda_graphs import CudaPool
from tests.models import Stack, random_schedule, stack, stack_call
from tests.waiting import no_waiting

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
    of_prologue = 0 if lowering == "plain" else 2  # of a step that was not foreseen, and of a run that was
    assert report.graphs.recorded == report.plans[0].programs_with_addresses + of_prologue
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
    with no_waiting():
        for call in calls[2:-1]:
            compiled(**call)
    compiled(**calls[-1])


def test_a_wrong_timestep_is_raised_at_the_end_and_the_next_run_is_right(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    run(compiled), run(compiled)
    with pytest.raises(RunError, match="other timesteps than in the previous run"):
        run(compiled, first=1)
    assert close(run(compiled, first=1), run(truth, first=1))


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


def test_graphs_of_others_and_emptied_caches_between_runs_change_nothing(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    other = torch.compile(torch.nn.Linear(64, 64).cuda(), mode="reduce-overhead")
    x = torch.randn(2, 64, device="cuda")
    with torch.no_grad():
        expected = other(x).clone()
        for turn in range(4):
            assert close(run(compiled, turn), run(truth, turn))
            for _ in range(3):
                assert torch.equal(other(x), expected)
            torch.cuda.empty_cache()
            poison = torch.full((64, 2**18), torch.nan, device="cuda")  # whatever memory was freed
            del poison


def test_a_failed_recording_leaves_earlier_and_later_ones_alone() -> None:
    pool = CudaPool(torch.device("cuda", torch.cuda.current_device()))
    x = torch.ones(64, 64, device="cuda")

    def product() -> tuple[Any, ...]:
        return (x @ x,)

    pool.warm_up(product)
    earlier = pool.record(product)
    with pytest.raises(RuntimeError):
        pool.record(lambda: (*product(), x.sum().item()))
    for graph in (earlier, pool.record(product)):
        assert torch.equal(graph.replay()[0], torch.full((64, 64), 64.0, device="cuda"))


def test_runs_on_other_streams_wait_for_those_before(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    expected = run(truth)
    torch.cuda.synchronize()
    got = []
    for _ in range(6):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # late, so that a run that does not wait overtakes it
            got.append(run(compiled))
    torch.cuda.synchronize()
    assert all(close(outputs, expected) for outputs in got)


def test_the_memory_of_a_plan_comes_back(model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    compiled = hrt.compile(model, schedule, graphs="on", strict=True)
    run(compiled), run(compiled), run(compiled)
    assert compiled.report().graphs.pool_bytes > 0
    del compiled
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (2 << 20)  # a block of the caching allocator


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_over_two_gpus_has_no_graphs() -> None:
    class Split(Stack):
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            scale = self.embed(timestep[:, None])[:, None]
            latents = self.blocks[0](latents, scale).to("cuda:1")
            return self.blocks[1](latents, scale.to("cuda:1"))

    model = Split(depth=2, width=64).eval().to("cuda:0")
    model.blocks[1].to("cuda:1")
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    for _ in range(3):
        assert close(run(compiled), run(truth))
    assert all("a graph holds the work of one device" in reason for reason in compiled.report().graphs.refusals)
