"""Joined parameters in runs: what happens to the model's own parameters is seen, with graphs and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from harmonica_rt.lower import joining_rule
from tests.cuda_double import CudaDouble
from tests.execute.test_graph_replay import close, compiled_with
from tests.models import Stack, attending, stack_call
from tests.stand_in import StandInPool

STEPS, WIDTH = 5, 16
KEY = tuple(900.0 - 100 * step for step in range(STEPS))

Change = Callable[[Stack], None]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Join on a CPU by the rule for GPUs."""
    monkeypatch.setattr(joining_rule, "DEVICES", joining_rule.DEVICES | {"cpu"})


def query(model: Stack, block: int = 0) -> nn.Linear:
    attention: Any = model.blocks[block].attn
    return attention.to_q  # type: ignore[no-any-return]


@torch.no_grad()
def written_in_place(model: Stack) -> None:
    query(model).weight.mul_(-1)
    query(model, 1).bias.add_(1)


@torch.no_grad()
def replaced(model: Stack) -> None:
    query(model).weight = nn.Parameter(-query(model).weight)


@torch.no_grad()
def replaced_data(model: Stack) -> None:
    query(model).weight.data = -query(model).weight


@torch.no_grad()
def moved(model: Stack) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def loaded(model: Stack) -> None:
    model.load_state_dict({name: -value for name, value in model.state_dict().items()})


def optimised(model: Stack) -> None:
    """One step of an optimiser on what the model gives now."""
    with torch.enable_grad():
        model(**stack_call(7, width=WIDTH)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None


class LowRank(nn.Module):
    """A layer with an adapter, as LoRA adds one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., D]."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapted(model: Stack) -> None:
    torch.manual_seed(3)
    model.blocks[0].attn.to_q = LowRank(query(model))  # type: ignore[union-attr]


CHANGES = (written_in_place, replaced, moved, loaded, optimised, adapted)


class Case:
    """A compiled model, with graphs or without, beside its reference."""

    def __init__(self, graphs: bool, schedule: hrt.Schedule | None = None) -> None:
        self.model = attending()
        schedule = schedule or hrt.Schedule.every(2, steps=STEPS, sites=hrt.find_sites(self.model))
        if graphs:
            self.pool = StandInPool()
            self.compiled = compiled_with(self.model, schedule, self.pool, lowering="fused")
        else:
            self.compiled = hrt.compile(self.model, schedule, lowering="fused", strict=True, graphs="off")
        self.truth = hrt.reference(self.model, schedule)

    def agree(self, request: int, change: Change | None = None, at: int = 0, but: int | None = None) -> bool:
        """Whether a run gives what the reference gives, with a change before the step `at`, in every step `but` one."""
        got, expected = [], []
        self.compiled.reset(KEY)
        self.truth.reset()
        for step in range(STEPS):
            if change is not None and step == at:
                change(self.model)
            call = {**stack_call(step, width=WIDTH), "latents": stack_call(10 * request + step, width=WIDTH)["latents"]}
            got.append(self.compiled(**call))
            expected.append(self.truth(**call))
        judged = [step for step in range(STEPS) if step != but]
        return close([got[step] for step in judged], [expected[step] for step in judged])

    @property
    def joined(self) -> int:
        """The number of joined products of the plan in use."""
        return [*self.compiled.plans.values()][-1].lowered.lowering.report().joining.products


@pytest.fixture(params=[True, False], ids=["graphs", "launches"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param:
        request.getfixturevalue("cuda")
    return Case(request.param)


@pytest.mark.parametrize("at", [0, 2], ids=["between runs", "in mid-run"])
def test_changes_are_seen(case: Case, at: int) -> None:
    for request in range(3):
        assert case.agree(request)
    assert case.joined == 2
    for change in CHANGES if at else (replaced_data, *CHANGES):
        assert case.agree(4, change, at), change.__name__
        assert case.agree(5), change.__name__
    assert case.joined == 2  # one of a layer with an adapter among them


def test_data_assigned_in_mid_run_is_seen_one_step_later(case: Case) -> None:
    """It looks like a move, which is noticed behind the step that it comes before."""
    case = Case(hasattr(case, "pool"), hrt.Schedule.all_compute(steps=STEPS, sites=hrt.find_sites(case.model)))
    for request in range(3):
        assert case.agree(request)
    assert case.agree(4, replaced_data, 2, but=2)
    assert case.agree(5)


def test_one_call_copies_all_of_them_once_per_run(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(graphs=True)
    calls: list[int] = []
    copy_all = torch._foreach_copy_

    def counted(targets: list[Tensor], sources: list[Tensor]) -> None:
        calls.append(sum(isinstance(source, nn.Parameter) for source in sources))
        copy_all(targets, sources)

    for request in range(4):
        assert case.agree(request)
    recorded = case.pool.recorded
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    assert case.agree(4)
    assert not any(calls)  # a graph does it
    assert case.agree(5, moved, at=2)
    assert sum(map(bool, calls)) == 1
    assert case.agree(6)
    assert case.pool.recorded > recorded


def test_another_dtype_is_another_plan(cuda: CudaDouble) -> None:
    case = Case(graphs=True)
    assert case.agree(0)
    case.model.to(torch.float64)
    outputs = []
    for denoiser in (case.compiled, case.truth):
        denoiser.reset()
        calls = [stack_call(step, width=WIDTH) for step in range(STEPS)]
        outputs.append([denoiser(**{name: value.double() for name, value in call.items()}) for call in calls])
    assert close(*outputs)
    assert case.joined == 2
    assert len(case.compiled.plans) == 2


def test_the_users_parameters_are_left_alone(case: Case) -> None:
    before = copy.deepcopy(case.model.state_dict())
    tensors = list(case.model.parameters())
    for request in range(3):
        assert case.agree(request)
    assert all(map(torch.equal, before.values(), case.model.state_dict().values()))
    assert all(map(lambda a, b: a is b, tensors, case.model.parameters()))


def test_the_report_says_what_was_joined(cuda: CudaDouble) -> None:
    case = Case(graphs=False)
    assert case.agree(0)
    text = str(case.compiled.report())
    assert "6 linear layers are computed as 2 products, whose joined parameters take 0.01 MiB per stream" in text
