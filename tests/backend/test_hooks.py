"""Hooks that come and go after torch.compile traced the model. Dynamo does not look at them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo

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
def test_hooks_come_and_go(in_place: bool) -> None:
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
