from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.indices import SiteIndex, SiteOutput
from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.specialise import Pattern, specialise

COMPUTE = frozenset[SiteIndex]()
SITE = SiteIndex(0)


class Tail(nn.Module):
    """A model whose result is a view of its only site's output, next to a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y.reshape(-1), x


def captured_tail() -> tuple[Tail, torch.Tensor, CapturedGraph]:
    model, x = Tail().eval(), torch.randn(3, 4)
    return model, x, capture(model, CallConvention(model).normalise((x,), {}), ["body"])


def bind(program: Program, model: nn.Module) -> tuple[Any, ...]:
    return program.bind({name: p.detach() for name, p in model.named_parameters()}, {})


def test_a_store_writes_the_slot_and_nothing_else() -> None:
    model, x, captured = captured_tail()
    program = Program(specialise(captured, Pattern(COMPUTE, frozenset({SiteOutput(SITE, 0)}))), captured.root)
    slot = torch.full((3, 4), torch.nan)
    with torch.no_grad():
        result, _ = program(bind(program, model), [x], [], [slot])
        expected = model.body(x)
    assert torch.equal(slot, expected)
    assert torch.equal(result, expected.reshape(-1))


def test_results_share_memory_with_no_slot_and_no_input() -> None:
    model, x, captured = captured_tail()
    program = Program(specialise(captured, Pattern(frozenset({SITE}), frozenset())), captured.root)
    slot = torch.ones(3, 4)
    result, passed = program(bind(program, model), [x], [slot], [])
    slot.fill_(torch.nan)
    x.fill_(torch.nan)
    assert torch.equal(result, torch.ones(12))
    assert not passed.isnan().any()


class Expanded(nn.Module):
    """A site whose output has a stride of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Broadcast()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Broadcast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=0, keepdim=True).expand(3, 4)


def test_an_expanded_value_is_stored_once_an_element() -> None:
    model, x = Expanded().eval(), torch.randn(3, 4)
    captured = capture(model, CallConvention(model).normalise((x,), {}), ["body"])
    program = Program(specialise(captured, Pattern(COMPUTE, frozenset({SiteOutput(SITE, 0)}))), captured.root)
    slot = torch.empty(4).as_strided((3, 4), (0, 1))
    program((), [x], [], [slot])
    assert torch.equal(slot, x.mean(dim=0, keepdim=True).expand(3, 4))
