"""The pool of CUDA graphs, over the double of `torch.cuda`: order, and recovery from recordings that fail."""

from __future__ import annotations

import contextlib
import linecache
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.execute import cuda_graphs as graphs_module
from harmonica_rt.execute.cuda_graphs import MAX_FAILURES, CudaPool
from tests.cuda_double import CudaDouble
from tests.models import Stack, random_schedule, stack, stack_call

CPU = torch.device("cpu")
STEPS = 6
Body = Callable[[], tuple[Any, ...]]


@pytest.fixture
def pool(cuda: CudaDouble) -> CudaPool:
    return CudaPool(CPU)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(4, 4)


def product(x: torch.Tensor) -> Body:
    return lambda: (x @ x,)


def waiting(x: torch.Tensor) -> Body:
    return lambda: (x * x.sum().item(),)


def test_order_of_a_recording(cuda: CudaDouble, pool: CudaPool, x: torch.Tensor) -> None:
    pool.warm_up(product(x))
    cuda.calls.clear()
    pool.record(product(x))
    once = ["handle", "clear", "begin", "end", "clear"]
    assert cuda.calls == ["synchronize", "empty_cache", *once, *once]  # the anchor's, and the body's
    cuda.calls.clear()
    pool.record(product(x))
    assert cuda.calls == ["synchronize", *once]


def test_a_graph_reads_what_it_was_recorded_with(cuda: CudaDouble, pool: CudaPool, x: torch.Tensor) -> None:
    graph = pool.record(product(x))
    x.fill_(2)
    (output,) = graph.replay()
    assert torch.equal(output, torch.full((4, 4), 16.0))


def test_a_failed_recording_leaves_earlier_and_later_ones_alone(
    cuda: CudaDouble,
    pool: CudaPool,
    x: torch.Tensor,
) -> None:
    earlier = pool.record(product(x))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        pool.record(waiting(x))
    assert not cuda.pools.opened
    later = pool.record(product(x))
    assert len({graph.pool for graph in cuda.graphs}) == 2  # pools, one for those before and one for those after
    for graph in (earlier, later):
        assert torch.equal(graph.replay()[0], torch.full((4, 4), 4.0))


def test_a_first_recording_may_fail_too(cuda: CudaDouble, pool: CudaPool, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        pool.record(waiting(x))
    assert torch.equal(pool.record(product(x)).replay()[0], torch.full((4, 4), 4.0))


def test_recordings_that_keep_failing_take_no_more_memory(cuda: CudaDouble, pool: CudaPool, x: torch.Tensor) -> None:
    for _ in range(MAX_FAILURES):
        with pytest.raises(RuntimeError, match="not permitted"):
            pool.record(waiting(x))
    before = cuda.memory_reserved()
    with pytest.raises(RuntimeError, match="have failed"):
        pool.record(waiting(x))
    assert cuda.memory_reserved() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=lambda error: error.__name__)
def test_an_exception_in_the_body_ends_the_recording(
    cuda: CudaDouble,
    pool: CudaPool,
    x: torch.Tensor,
    error: type[BaseException],
) -> None:
    def stop() -> tuple[Any, ...]:
        raise error

    for _ in range(MAX_FAILURES + 1):
        with pytest.raises(error):
            pool.record(stop)
    assert not cuda.pools.opened
    assert all(stream.recording is None for stream in cuda.streams)
    assert torch.equal(pool.record(product(x)).replay()[0], torch.full((4, 4), 4.0))


def lines_of(run: Callable[[], object], interrupt_at: int | None = None) -> int:
    """Lines of the pool's module that `run` executes; at the given one Ctrl-C comes.

    Not at `with` statements: Python traces their exit as such a line, and looks at no signal there.
    """
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith("execute/cuda_graphs.py"):
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not line.startswith("with "):
            seen += 1
            if seen == interrupt_at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return seen


def test_an_interruption_at_any_line_leaves_a_pool_that_records(cuda: CudaDouble, x: torch.Tensor) -> None:
    total = lines_of(lambda: CudaPool(CPU).record(product(x)))
    for line in range(1, total + 1):
        pool = CudaPool(CPU)
        earlier = pool.record(product(x))
        with contextlib.suppress(KeyboardInterrupt):
            lines_of(lambda: pool.record(product(x)), line)  # noqa: B023 - called at once
        assert not graphs_module._RECORDING.locked(), f"line {line}"
        assert not cuda.pools.opened, f"line {line}"
        assert all(stream.recording is None for stream in cuda.streams), f"line {line}"
        for graph in (earlier, pool.record(product(x))):
            assert torch.equal(graph.replay()[0], torch.full((4, 4), 4.0)), f"line {line}"


def test_graphs_own_their_workspaces(cuda: CudaDouble, pool: CudaPool, x: torch.Tensor) -> None:
    cuda.synchronize()
    with torch.cuda.stream(cuda.streams[-1]):
        x @ x  # leaves a workspace of the stream that records
    graph = pool.record(product(x))
    pool.warm_up(product(x))
    graph.replay()
    assert cuda.faults == []


def test_a_thread_of_its_own_records(cuda: CudaDouble, pool: CudaPool, x: torch.Tensor) -> None:
    """Its handle is made before."""
    errors: list[BaseException] = []

    def record() -> None:
        try:
            with cuda:
                pool.record(product(x))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=record)
    thread.start()
    thread.join()
    assert errors == []


def test_a_pool_counts_what_it_reserved_and_gives_it_back(cuda: CudaDouble, x: torch.Tensor) -> None:
    cuda.pools.cached, pool = 1000, CudaPool(CPU)
    graph = pool.record(product(x))
    assert pool.nbytes == cuda.memory_reserved() > 0  # nothing is left of the cache, and none of it was counted
    del graph, pool
    cuda.empty_cache()
    assert cuda.memory_reserved() == 0


# ---- whole runs


@pytest.fixture
def model() -> Stack:
    return stack()


def run(model: Any, seed: int = 0) -> list[torch.Tensor]:
    model.reset()
    return [model(**stack_call(100 * seed + step)) for step in range(STEPS)]


def close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("lowering", ["plain", "fused"])
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_runs_on_other_streams_wait_for_those_before(
    cuda: CudaDouble, model: Stack, lowering: str, graphs: str
) -> None:
    """Every run on a stream of its own: nothing of it depends on the run before but the memory."""
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = hrt.compile(model, schedule, lowering=lowering, graphs=graphs, strict=True, debug=True)
    truth = hrt.reference(model, schedule)
    expected = [run(truth, seed) for seed in range(4)]
    cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(4)], []
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            got.append(run(compiled, seed))
    cuda.synchronize()
    assert all(map(close, got, expected))
    (runtime,) = compiled.plans.values()
    (memory,) = runtime.arenas._held
    arenas = [*memory.buffers.arenas.values()]
    assert arenas
    assert all(cuda.memories.of(arena).users >= {*streams[1:]} for arena in arenas)
    assert (len(cuda.graphs) > 0) == (graphs == "on")


def test_each_plan_has_a_pool_that_goes_with_it(cuda: CudaDouble, model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = hrt.compile(model, schedule, graphs="on", strict=True, max_plans=1)
    run(compiled), run(compiled), run(compiled)
    report = compiled.report()
    assert report.graphs is not None
    assert report.graphs.pool_bytes == cuda.memory_reserved() > 0
    assert (
        report.plans[0].memory.held_bytes == report.cache_bytes + report.graphs.static_bytes + report.graphs.pool_bytes
    )
    compiled.reset()
    compiled(**stack_call(0, tokens=6))
    cuda.empty_cache()
    assert cuda.memory_reserved() == 0


def test_a_recording_that_fails_is_one_program_less(
    cuda: CudaDouble,
    model: Stack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, graphs="on", strict=True), hrt.reference(model, schedule)
    record, failed = CudaPool.record, []

    def fail_once(pool: CudaPool, body: Body) -> Any:
        if failed:
            return record(pool, body)
        failed.append(body)
        return record(pool, lambda: (*body(), torch.ones(1).item()))

    monkeypatch.setattr(CudaPool, "record", fail_once)
    for seed in range(4):
        assert close(run(compiled, seed), run(truth, seed))
    (runtime,) = compiled.plans.values()
    assert [str(refusal) for refusal in runtime.arenas.graphs[0].refusals.values()] == [
        "it cannot be recorded: operation not permitted when stream is capturing"
    ]
    assert len(runtime.arenas.graphs[0]) > 0


def test_verify_records_and_replays(cuda: CudaDouble, model: Stack) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    calls = [stack_call(step) for step in range(STEPS)]
    assert hrt.verify(model, schedule, calls=calls, graphs="on", tolerance="measured").ok
    replayed = cuda.calls.count("replay")
    assert replayed > STEPS
    assert hrt.verify(model, schedule, calls=calls, graphs="off", tolerance="measured").ok
    assert cuda.calls.count("replay") == replayed
