"""Hooks and code that change after torch.compile traced the model. Dynamo does not look at them by itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo
from torch import nn
from torch.nn.modules import module as every_module

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.backend import attach
from tests.models import SITES, stack, stack_call

STEPS = 4


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    dynamo.reset()


def run_of(traced: Any, session: Any) -> torch.Tensor:
    session.reset()
    with torch.no_grad():
        return torch.stack([traced(**stack_call(step)) for step in range(STEPS)])


@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_are_refused_while_they_are_there(in_place: bool) -> None:
    """They are refused, as they are from the start, and without them the graph is found again."""
    model: Any = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))
    options = {"schedule": schedule, "lowering": "plain"}
    traced: Any = model
    if in_place:
        model.compile(backend="harmonica", options=options)
    else:
        traced = torch.compile(model, backend="harmonica", options=options)
    with torch.no_grad():
        traced(**stack_call(0))
    session = attach(traced)
    expected = run_of(traced, session)

    inside = model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(Exception, match=r"forward hooks on Sequential \(at blocks\.1\.mlp\)"):
        run_of(traced, session)
    inside.remove()
    assert torch.equal(run_of(traced, session), expected)

    around = model.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(Exception, match="a forward hook on the model"):
        run_of(traced, session)
    around.remove()
    assert torch.equal(run_of(traced, session), expected)


def test_hooks_on_every_module_are_refused() -> None:
    model: Any = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))
    traced: Any = torch.compile(model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    with torch.no_grad():
        traced(**stack_call(0))
    session = attach(traced)
    expected = run_of(traced, session)
    handle = every_module.register_module_forward_hook(lambda module, args, output: output * 0.5)
    try:
        with pytest.raises(Exception, match="hook"):
            run_of(traced, session)
    finally:
        handle.remove()
    assert torch.equal(run_of(traced, session), expected)


def test_a_model_whose_own_forward_closes_over_it_is_freed() -> None:
    model = closing_over_itself()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))
    traced: Any = torch.compile(model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    with torch.no_grad():
        traced(**stack_call(0))
    gone = weakref.ref(model)
    del model, traced
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("change", ["method", "class attribute", "default"])
def test_code_that_changes_is_traced_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Coded().eval()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=[f"inner.{s}" for s in SITES]))
    traced: Any = torch.compile(model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    with torch.no_grad():
        traced(**stack_call(0))
    session = attach(traced)
    before = run_of(traced, session)
    if change == "method":
        monkeypatch.setattr(Coded, "bent", lambda self, x: x * 3)
    elif change == "class attribute":
        monkeypatch.setattr(Coded, "gain", 4.0)
    else:
        monkeypatch.setattr(shifted, "__defaults__", (2.0,))
    expected = run_of(hrt.reference(model, schedule), SimpleNamespace(reset=lambda: None))
    assert not torch.equal(expected, before)
    assert torch.equal(run_of(traced, session), expected)
    monkeypatch.undo()
    assert torch.equal(run_of(traced, session), before)


def closing_over_itself() -> Any:
    model: Any = stack()
    own = type(model).forward
    model.forward = lambda latents, timestep: own(model, latents, timestep)
    return model


def shifted(x: torch.Tensor, by: float = 0.5) -> torch.Tensor:
    return x + by


class Coded(nn.Module):
    """What it computes hangs on its class and on a function."""

    gain = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def bent(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.inner(self.bent(shifted(latents)) * self.gain, timestep)


def test_the_storage_offset_of_a_timestep_is_no_change() -> None:
    """`timesteps[i].expand(batch)`: dynamo makes a number of where it begins, once another batch size has come."""
    model: Any = stack()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model, patterns=SITES))
    traced: Any = torch.compile(model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    truth, timesteps = hrt.reference(model, schedule), torch.linspace(1.0, 0.1, STEPS)

    def outputs(denoiser: Any, batch: int) -> torch.Tensor:
        calls = [stack_call(step, batch) for step in range(STEPS)]
        for step, call in enumerate(calls):
            call["timestep"] = timesteps[step].expand(batch)
        with torch.no_grad():
            return torch.stack([denoiser(**call) for call in calls])

    with torch.no_grad():
        traced(**stack_call(0))
    session = attach(traced)
    for batch in (1, 2, 3, 2, 1):
        session.reset()
        truth.reset()
        assert torch.equal(outputs(traced, batch), outputs(truth, batch))
        assert not session.report().last_catch_ups
