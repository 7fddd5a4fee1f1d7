"""Runs on several CUDA streams, and memory that is freed while work on it is pending, on the double of `torch.cuda`."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from tests.cuda_double import CudaDouble
from tests.execute.on_streams import Case, allocate, on_device
from tests.execute.test_prologue_replay import KEY, STEPS, run
from tests.models import random_schedule
from tests.sampling import loops


@pytest.mark.parametrize(
    ("graphs", "mode"),
    [("on", contextlib.nullcontext), ("on", torch.inference_mode), ("off", contextlib.nullcontext)],
    ids=["on", "on, inference", "off"],
)
def test_runs_in_turn(cuda: CudaDouble, graphs: str, mode: Any) -> None:
    case = Case(cuda, graphs=graphs, debug=True)
    with mode():
        for request in range(5):
            case.run(on=request % 2)
    assert case.right()
    assert (cuda.calls.count("replay") > STEPS) == (graphs == "on")


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_plan_that_is_dropped_while_its_work_is_pending(cuda: CudaDouble, graphs: str) -> None:
    case = Case(cuda, graphs=graphs, max_plans=1)
    run_and_drop(case)
    assert case.right()


def run_and_drop(case: Case) -> None:
    """Another plan takes the place of the first, on the stream that allocated all memory of that."""
    for _ in range(4):
        case.run(on=0)
    with torch.cuda.stream(case.streams[1]):  # without scheduler timesteps: the end of such a run waits for nothing
        case.got.append(run(case.compiled, case.calls[4], None))
    case.compiled.reset()
    with torch.cuda.stream(case.streams[0]):
        case.compiled(latents=torch.randn(3, 4, 8), timestep=torch.ones(3), prompt=torch.randn(3, 3))
    assert len(case.compiled.plans) == 1
    gc.collect()
    allocate(case.streams[0])


class Guided(loops.Pipeline):
    """Two calls per step, one for each prompt."""

    @torch.no_grad()
    def __call__(self, **_: Any) -> torch.Tensor:
        latents = loops.first_latents()
        self.scheduler.set_timesteps(loops.STEPS)
        for timestep in self.scheduler.timesteps:
            time = loops.model_time(timestep)
            wanted, other = (self.transformer(latents, time, prompt) for prompt in (loops.PROMPT, loops.OTHER))
            latents = self.scheduler.step(wanted + 2 * (wanted - other), timestep, latents).prev_sample
        return latents


def test_two_calls_per_step_on_streams_in_turn_then_dropped(cuda: CudaDouble) -> None:
    """The memory of the second call's stream is told of the other CUDA stream too."""
    pipeline = Guided(on_device(loops.conditioned()))
    schedule = random_schedule(pipeline.transformer, loops.STEPS, seed=2)
    hrt.compile(pipeline, schedule, graphs="on", strict=True)
    cuda.synchronize()
    got, streams = [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for on in (0, 0, 0, 1):
        with torch.cuda.stream(streams[on]):
            got.append(pipeline())
    hrt.uncompile(pipeline)
    gc.collect()
    allocate(streams[0])
    cuda.synchronize()
    expected = guided_by(loops.Oracle(pipeline.transformer, schedule))
    assert all(torch.allclose(image, expected, rtol=1e-4, atol=1e-5) for image in got)


def guided_by(oracle: loops.Oracle) -> torch.Tensor:
    """What `Guided` gives under the schedule."""
    scheduler, latents = loops.DDIMScheduler(), loops.first_latents()
    scheduler.set_timesteps(loops.STEPS)
    for step, timestep in enumerate(scheduler.timesteps):
        time = loops.model_time(timestep)
        wanted, other = (oracle(step, prompt, latents, time, p) for prompt, p in enumerate((loops.PROMPT, loops.OTHER)))
        latents = scheduler.step(wanted + 2 * (wanted - other), timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("step", [1, STEPS - 1])
def test_a_model_that_is_moved_in_mid_run(cuda: CudaDouble, step: int) -> None:
    """To the host and back, say, while something else needs the memory: graphs hold addresses that are free by then."""
    case = Case(cuda)
    for _ in range(4):
        case.run(on=0)
    outputs = run_with(case, step, lambda: move(case))
    case.got.append(outputs)
    assert case.right()
    assert not case.compiled.stats.catch_ups


def run_with(case: Case, at: int, change: Any) -> list[torch.Tensor]:
    """A run on the first stream with a change before one of its steps."""
    outputs = []
    with torch.cuda.stream(case.streams[0]):
        case.compiled.reset(KEY)
        for step, call in enumerate(case.calls[len(case.got)]):
            if step == at:
                change()
            outputs.append(case.compiled(**call))
    return outputs


def move(case: Case) -> None:
    """Other addresses for all parameters; the memory they had is given to others."""
    on_device(case.model)
    allocate(case.cuda.default)
    allocate(torch.cuda.current_stream())
    case.cuda.synchronize()  # as a copy from the host does


def test_memory_that_a_model_gave_up_in_mid_run_is_read_by_one_more_step(cuda: CudaDouble) -> None:
    """That step is launched before the model is looked at; the next knows that it was moved."""
    case = Case(cuda)
    for _ in range(4):
        case.run(on=0)
    memory = [cuda.memories.of(tensor) for tensor in case.model.parameters()]
    case.compiled.reset(KEY)
    for step, call in enumerate(case.calls[4]):
        if step == 2:
            move(case)
        case.compiled(**call)
        allocate(cuda.default)
        assert all(one.freed for one in memory) == (step > 2)


def test_memory_that_a_model_gave_up_is_free_once_the_run_is_over(cuda: CudaDouble) -> None:
    case = Case(cuda, runs=3)
    for _ in range(3):
        case.run(on=0)
    memory = [cuda.memories.of(tensor) for tensor in case.model.parameters()]
    on_device(case.model)
    allocate(case.streams[0])
    assert all(one.freed for one in memory)


def test_a_model_that_lies_elsewhere_in_each_run(cuda: CudaDouble) -> None:
    case = Case(cuda)
    for request in range(5):
        cuda.synchronize()  # as a copy to the host does
        move(case)
        case.run(on=request % 2)
    assert case.right()


def test_runs_that_are_interrupted_on_another_stream(cuda: CudaDouble) -> None:
    case = Case(cuda, runs=4)
    for request in range(4):
        with torch.cuda.stream(case.streams[1]), torch.inference_mode():
            case.compiled.reset(KEY)
            for call in [{name: value.clone() for name, value in case.calls[request][0].items()}] * (request + 1):
                case.compiled(**call)
        case.run(on=0)
    assert case.right()


def test_a_request_under_inference_mode_is_compared_on_the_stream_at_hand(cuda: CudaDouble) -> None:
    """Its copy, and the result, belong to the CUDA stream of the first call; the last call and the end use others."""
    case = Case(cuda, runs=2)
    with torch.inference_mode():
        calls = [{name: value.clone() for name, value in call.items()} for call in case.calls[0]]
    cuda.synchronize()
    first, second = case.streams
    with torch.inference_mode():
        with torch.cuda.stream(first):
            case.compiled.reset(KEY)
            outputs = [case.compiled(**{**call, "prompt": calls[0]["prompt"]}) for call in calls[:-1]]
        with torch.cuda.stream(second):
            outputs.append(case.compiled(**{**calls[-1], "prompt": calls[0]["prompt"]}))
    allocate(first)
    case.got.append(outputs)
    case.run(on=1)
    assert case.right()


def test_threads_with_streams_of_their_own_take_turns(cuda: CudaDouble) -> None:
    case = Case(cuda)
    errors: list[BaseException] = []

    def one_run(on: int) -> None:
        try:
            with cuda:
                case.run(on)
        except BaseException as error:
            errors.append(error)

    for request in range(5):
        thread = threading.Thread(target=one_run, args=(request % 2,))
        thread.start()
        thread.join()
    assert errors == []
    assert case.right()


def test_threads_with_models_of_their_own_run_at_once(cuda: CudaDouble) -> None:
    cases = [Case(cuda, runs=4), Case(cuda, runs=4)]
    errors: list[BaseException] = []

    def all_runs(case: Case) -> None:
        try:
            with cuda:
                for _ in range(4):
                    case.run(on=0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=all_runs, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(case.right() for case in cases)


def test_plans_that_warm_up_on_one_stream(cuda: CudaDouble) -> None:
    case = Case(cuda)
    warm_up_on_one_stream(case)
    assert case.right()


def warm_up_on_one_stream(case: Case) -> None:
    """torch's CUDA streams are few: two pools may get the same one, for callers that do not wait for each other."""
    other = torch.cuda.Stream()
    case.cuda.all_streams.most = 1
    case.run(on=1)
    with torch.cuda.stream(case.streams[1]):
        case.got = [[output * 2 for output in case.got[0]]]  # and the outputs themselves are given up
    case.expected = [[output * 2 for output in case.expected[0]]]
    case.compiled.reset()
    with torch.cuda.stream(other):
        case.compiled(latents=torch.randn(3, 4, 8), timestep=torch.ones(3), prompt=torch.randn(3, 3))
