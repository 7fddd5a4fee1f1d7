"""What other threads do while a model is captured is done as ever, and is not taken for the model's."""

from __future__ import annotations

import cProfile
import math
import pstats
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule

STEPS = 4
T = TypeVar("T")

# Locks, since nothing that a forward's values depend on shows in them.
ENTERED, GO_ON = threading.Lock(), threading.Lock()


def stand_still() -> None:
    """Within a forward: tell that it got here, and wait until it may go on."""
    if ENTERED.locked():
        ENTERED.release()
    if not GO_ON.acquire(timeout=60):
        raise TimeoutError
    GO_ON.release()


class Standing(nn.Module):
    """Stands still in the midst of its forward. One of its modules has two names: such are traced through stand-ins."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.again(self.first(hidden_states)) * sqrt(2.0)
        stand_still()
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden + timestep.view(-1, 1, 1)


class Drawing(Standing):
    """Draws from Python's generator, `how` it says."""

    how: str

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        draws: dict[str, Callable[[], float]] = {
            "random": lambda: random.random(),
            "randint": lambda: random.randint(1, 6),
            "gauss": lambda: random.gauss(0, 1),
            "choice": lambda: random.choice([1.0]),
        }
        return super().forward(hidden_states, timestep) * (1 + draws[self.how]())


def call(step: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"hidden_states": torch.randn(2, 3, 4, generator=generator), "timestep": torch.full((2,), 1.0 - step / 9)}


def standing(kind: type[Standing] = Standing) -> Standing:
    torch.manual_seed(0)
    return kind().eval()


def compiled(model: Standing) -> hrt.CompiledModel:
    schedule = Schedule.every(2, steps=STEPS, sites=("blocks.0", "blocks.1"))
    return hrt.compile(model, schedule, lowering="plain")


def run_of(denoiser: Any) -> torch.Tensor:
    denoiser.reset()
    with torch.no_grad():
        return torch.stack([denoiser(**call(step)) for step in range(STEPS)])


def meanwhile(denoiser: Any, work: Callable[[], T]) -> tuple[T, torch.Tensor]:
    """Do `work` in this thread while another one captures the model; what it gives, and what the other's run gave."""
    assert ENTERED.acquire(timeout=60)
    try:
        with ThreadPoolExecutor(1) as pool:
            with GO_ON:
                run = pool.submit(run_of, denoiser)
                while not ENTERED.acquire(timeout=0.05):  # released in the midst of the forward
                    assert not run.done(), run.result()
                result = work()
            return result, run.result(timeout=60)
    finally:
        if ENTERED.locked():
            ENTERED.release()


@torch.no_grad()
def test_modules_of_other_threads_run_during_a_trace() -> None:
    """Those of another model, of one that is built meanwhile, and compiled ones."""
    model, other = standing(), standing()
    expected = run_of(compiled(other))
    inner = torch.compile(other.blocks[0], backend="eager")
    image = torch.randn(2, 3, 4)
    attended = other.attention(image, image, image, need_weights=False)[0]  # rounds otherwise where torch compiles
    inner(image)

    def work() -> list[Any]:
        return [
            other.first(image),
            type(other.again),
            other.attention(image, image, image, need_weights=False)[0],
            inner(image),
            nn.BatchNorm1d(4).eval()(image[0]),
        ]

    found, run = meanwhile(compiled(model), work)
    alone = work()
    assert [kind for kind in found if isinstance(kind, type)] == [nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True) if isinstance(a, torch.Tensor))
    assert torch.equal(found[2], attended)
    assert torch.equal(run, expected)


def test_other_threads_see_no_trace_and_the_functions_of_python() -> None:
    def work() -> list[Any]:
        nobody = max([], default=None)
        return [
            bool(torch.compiler.is_compiling()),
            bool(torch.compiler.is_exporting()),
            bool(torch.fx._symbolic_trace.is_fx_tracing()),
            nobody,
            max("b", "a"),
            min((3, "x"), (1, "y")),
            type(math.pow(2, 3)),
            sqrt is math.sqrt,
            nn.Module.__call__ is not None,
        ]

    found, _ = meanwhile(compiled(standing()), work)
    assert found == work() == [False, False, False, None, "b", (1, "y"), float, True, True]


@pytest.mark.parametrize("installed", [False, True])
@torch.no_grad()
def test_a_call_of_the_model_itself_waits(installed: bool) -> None:
    """Its weights are not in their places meanwhile."""
    model, plain = standing(), standing()
    expected = plain(**call(7))
    denoiser = compiled(model)
    results: list[Any] = []
    begun = threading.Event()

    def from_elsewhere() -> None:
        begun.set()
        with torch.no_grad():
            results.append(model(**call(7)))

    def work() -> threading.Thread:
        thread = threading.Thread(target=from_elsewhere)
        thread.start()
        assert begun.wait(60)
        assert not results
        return thread

    thread, run = meanwhile(denoiser, work)
    thread.join(60)
    assert torch.equal(results[0], expected)
    assert torch.equal(run, run_of(compiled(plain)))


def draw_from_python() -> list[Any]:
    return [random.random() for _ in range(3)]


def draw_from_numpy() -> list[Any]:
    return list(np.random.rand(3))


@pytest.mark.parametrize("draw", [draw_from_python, draw_from_numpy])
def test_random_draws_of_other_threads_are_not_taken_for_the_models(draw: Callable[[], list[Any]]) -> None:
    random.seed(0), np.random.seed(0)
    expected = [*draw(), *draw()]
    random.seed(0), np.random.seed(0)
    denoiser = compiled(standing())
    first, _ = meanwhile(denoiser, draw)
    assert [*first, *draw()] == expected
    assert denoiser.report().fallbacks == ()


@pytest.mark.parametrize("how", ["random", "randint"])
def test_a_model_that_draws_random_numbers_runs_without_a_plan(how: str) -> None:
    model = standing(Drawing)
    model.how = how
    denoiser = compiled(model)
    with pytest.warns(hrt.FallbackWarning, match="draws random numbers"):
        meanwhile(denoiser, draw_from_python)


def test_a_profiler_goes_on_after_a_model_was_watched() -> None:
    """Which is told from its neighbours by a profiler."""
    seen: list[str] = []

    def mine(frame: Any, event: str, called: Any) -> None:
        seen.append(event)

    model = standing(Drawing)
    model.how = "random"
    sys.setprofile(mine)
    try:
        with pytest.warns(hrt.FallbackWarning, match="draws random numbers"):
            run_of(compiled(model))
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    assert seen


@torch.no_grad()
def test_a_run_of_the_reference_under_way_ends_before_a_trace_begins() -> None:
    """It replaces the calls of sites for a while; a trace must not take those for the model's own."""
    model = standing()
    expected = model(**call(7))
    schedule = Schedule.every(2, steps=STEPS, sites=("blocks.0", "blocks.1"))
    reference, captured = hrt.reference(model, schedule), compiled(model)
    done: list[str] = []

    def capturing() -> None:
        captured(**call())
        done.append("capture")

    assert ENTERED.acquire(timeout=60)
    try:
        with ThreadPoolExecutor(2) as pool:
            with GO_ON:
                step = pool.submit(lambda: (reference(**call()), done.append("step")))
                assert ENTERED.acquire(timeout=60)
                capture = pool.submit(capturing)
                time.sleep(0.2)  # as long as it may wait: it is wrong only if it does not
                assert done == []
            step.result(timeout=60), capture.result(timeout=60)
    finally:
        if ENTERED.locked():
            ENTERED.release()
    assert done[0] == "step"
    assert torch.equal(model(**call(7)), expected)
    assert not any("_compiled_call_impl" in vars(block) for block in model.blocks)


class Naming(Standing):
    """Names Python's generator, and does not draw."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.training and random.uniform(0, 1) < 0.5:
            hidden_states = hidden_states * 0
        return super().forward(hidden_states, timestep)


def test_a_model_that_only_names_the_generator_is_not_changed_by_others_draws() -> None:
    denoiser = compiled(standing(Naming))
    expected = run_of(denoiser)
    denoiser.reset()
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            random.random()
            outputs.append(denoiser(**call(step)))
    assert torch.equal(torch.stack(outputs), expected)
    report = denoiser.report()
    assert (report.last_catch_ups, len(report.plans), report.fallbacks) == ((), 1, ())


@pytest.mark.parametrize("how", ["gauss", "choice"])
def test_draws_by_methods_of_pythons_random_are_seen(how: str) -> None:
    random.seed(0)
    random.gauss(0, 1)  # keeps a second number for the next call, which then asks nothing of C
    model = standing(Drawing)
    model.how = how
    with pytest.warns(hrt.FallbackWarning, match="draws random numbers"):
        run_of(compiled(model))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cProfile does not go by setprofile there")
def test_cprofile_goes_on_during_a_trace() -> None:
    profile = cProfile.Profile()
    profile.enable()
    try:
        meanwhile(compiled(standing()), draw_from_python)
        model = standing(Drawing)
        model.how = "random"
        with pytest.warns(hrt.FallbackWarning, match="draws random numbers"):
            run_of(compiled(model))
        draw_from_numpy()
    finally:
        profile.disable()
    assert any(name == "draw_from_numpy" for _, _, name in pstats.Stats(profile).stats)  # type: ignore[attr-defined]
