"""Runs that `reset()` begins: loops that take turns, and calls within calls."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import CompiledModel, Schedule
from harmonica_rt.errors import ConcurrentRunError, RunError
from tests.models import SITES, stack, stack_call

STEPS = 4


@pytest.fixture
def model() -> nn.Module:
    return stack()


@pytest.fixture(params=[hrt.compile, hrt.reference], ids=["compiled", "reference"])
def denoiser(request: pytest.FixtureRequest, model: nn.Module) -> Any:
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))
    how = {"lowering": "plain"} if request.param is hrt.compile else {}
    return request.param(model, schedule, **how)


def loop(denoiser: Any, shift: float = 0.0) -> Iterator[torch.Tensor]:
    """A run that can be halted between steps."""
    denoiser.reset()
    for step in range(STEPS):
        call = stack_call(step)
        yield denoiser(latents=call["latents"] + shift, timestep=call["timestep"])


def whole(denoiser: Any, shift: float = 0.0) -> list[torch.Tensor]:
    return list(loop(denoiser, shift))


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def helped(denoiser: Any, shift: float = 0.0) -> Iterator[torch.Tensor]:
    """As `loop`; another function begins the run, and a further one makes the calls."""

    def begin() -> None:
        denoiser.reset()

    def at(step: int) -> torch.Tensor:
        call = stack_call(step)
        return denoiser(latents=call["latents"] + shift, timestep=call["timestep"])

    begin()
    for step in range(STEPS):
        yield at(step)


@pytest.mark.parametrize("written", [loop, helped])
@pytest.mark.parametrize("done", range(1, STEPS))
def test_a_loop_that_goes_on_after_another_has_begun_is_told_so(
    denoiser: Any, done: int, written: Callable[..., Iterator[torch.Tensor]]
) -> None:
    expected = whole(denoiser, 1.0)
    first, second = written(denoiser), written(denoiser, 1.0)
    for _ in range(done):
        next(first)
    begun = [next(second)]
    with pytest.raises(ConcurrentRunError, match="take turns step by step"):
        next(first)
    assert equal([*begun, *second], expected)
    assert equal([*written(denoiser, 1.0)], expected)


def test_a_loop_that_goes_on_before_the_first_call_of_another_is_told_so(denoiser: Any) -> None:
    expected = whole(denoiser)
    first = loop(denoiser)
    next(first)
    denoiser.reset()
    with pytest.raises(ConcurrentRunError, match="take turns step by step"):
        next(first)
    assert equal([denoiser(**stack_call(step)) for step in range(STEPS)], expected)


def test_loops_one_after_the_other_are_fine(denoiser: Any) -> None:
    expected, halted = whole(denoiser), loop(denoiser)
    next(halted)
    assert equal(whole(denoiser), expected)
    assert equal([*loop(denoiser)], expected)


def test_who_begins_a_run_need_not_make_its_calls(denoiser: Any) -> None:
    expected = whole(denoiser)

    def begin() -> Iterator[None]:
        denoiser.reset()
        yield

    suspended = begin()
    next(suspended)  # its function neither runs nor has it returned
    assert equal([denoiser(**stack_call(step)) for step in range(STEPS)], expected)


def test_a_run_may_be_begun_in_a_generator_and_gone_on_with_outside(denoiser: Any) -> None:
    expected = whole(denoiser)

    def begin() -> Iterator[torch.Tensor]:
        denoiser.reset()
        yield denoiser(**stack_call(0))

    suspended = begin()
    outputs = [next(suspended)]
    outputs += [denoiser(**stack_call(step)) for step in range(1, STEPS)]
    assert equal(outputs, expected)


@pytest.mark.parametrize("step", range(STEPS))
def test_a_call_from_a_hook_of_the_model_is_the_plain_models(denoiser: Any, model: nn.Module, step: int) -> None:
    other, plain, expected = stack_call(9), model(**stack_call(9)), whole(denoiser)
    found, calls = [], 0

    def again(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step + 1:
            found.append(denoiser(**other))
            with pytest.raises(ConcurrentRunError, match="within one of its calls"):
                denoiser.reset()

    handle = model.register_forward_hook(again)
    assert equal(whole(denoiser), expected)
    handle.remove()
    assert torch.equal(found[0], plain)


def test_a_forward_that_a_hook_of_the_model_replaces_stays(denoiser: Any, model: nn.Module) -> None:
    calls = 0

    def replacing(module: nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            module.forward = types.MethodType(doubled, module)  # type: ignore[method-assign]

    model.register_forward_hook(replacing)
    outputs = whole(denoiser)
    assert torch.equal(outputs[1], 2 * type(model).forward(model, **stack_call(1)))


def test_a_forward_that_a_hook_of_the_model_wraps_stays_wrapped(denoiser: Any, model: nn.Module) -> None:
    """What it wraps is at that moment the denoiser's own stand-in, which is the model's forward from then on."""

    def wrapping(module: nn.Module, *_: Any) -> None:
        original = module.forward
        module.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)  # type: ignore[method-assign]
        handle.remove()

    handle = model.register_forward_hook(wrapping)
    outputs = whole(denoiser)
    assert torch.equal(outputs[1], 2 * type(model).forward(model, **stack_call(1)))
    assert torch.equal(model(**stack_call(1)), outputs[1])


def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
    return 2 * type(self).forward(self, *args, **kwargs)


class Own:
    """A pipeline of one's own, which begins the runs of its compiled model by itself."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.scheduler = denoiser, types.SimpleNamespace(set_timesteps=lambda steps: None)

    def __call__(self, between: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
        outputs = []
        self.denoiser.reset()
        for step in range(STEPS):
            outputs.append(self.denoiser(**stack_call(step)))
        between()
        return outputs


def test_two_pipelines_of_ones_own_may_share_a_compiled_model(model: nn.Module) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))
    compiled = hrt.compile(model, schedule, lowering="plain")
    expected, pipelines = whole(compiled), [Own(compiled), Own(compiled)]
    for _ in range(2):
        for pipeline in pipelines:
            assert equal(pipeline(), expected)
            assert type(pipeline.denoiser) is CompiledModel


@pytest.mark.parametrize("done", [2, 3])
def test_a_function_that_was_left_in_mid_run_has_ended_it(denoiser: Any, done: int) -> None:
    expected = whole(denoiser)

    def broken_off() -> None:
        denoiser.reset()
        for step in range(done):
            denoiser(**stack_call(step))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:  # its traceback holds the frame, as it does in a notebook
        broken_off()
    assert kept.traceback
    for _ in range(2):
        with pytest.raises(RunError, match=f"made the calls of this run has returned, after {done} calls. Call reset"):
            denoiser(**stack_call(done))
    assert equal(whole(denoiser), expected)


def test_several_functions_may_make_the_calls_of_one_run(denoiser: Any) -> None:
    expected = whole(denoiser)

    def some(steps: range) -> list[torch.Tensor]:
        return [denoiser(**stack_call(step)) for step in steps]

    def begun_here() -> list[torch.Tensor]:
        denoiser.reset()
        return some(range(2)) + some(range(2, STEPS))

    def begin() -> list[torch.Tensor]:
        denoiser.reset()
        return [denoiser(**stack_call(0))]

    assert equal(begun_here(), expected)
    assert equal(begin() + some(range(1, 3)) + some(range(3, STEPS)), expected)
    denoiser.reset()
    assert equal(some(range(2)) + some(range(2, STEPS)), expected)


def test_a_run_may_be_made_in_the_cells_of_a_notebook(denoiser: Any) -> None:
    cells = [
        "denoiser.reset(); outputs = [denoiser(**call(step)) for step in range(2)]",
        "outputs += [denoiser(**call(step)) for step in range(2, 3)]",
        "def rest():\n    return [denoiser(**call(step)) for step in range(3, 4)]\noutputs += rest()",
    ]
    expected, names = whole(denoiser), {"denoiser": denoiser, "call": stack_call}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)
    assert equal(names["outputs"], expected)
