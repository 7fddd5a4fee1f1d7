"""What is hoisted out of the bodies, and what has to stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.capture.capture import capture
from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.execute.forecast import Forecast, ForecastKey, Forecasts
from harmonica_rt.execute.lowered_prologue import LoweredPrologue
from harmonica_rt.execute.stream_prologue import StreamPrologue
from harmonica_rt.lower.hoist import Prologue, cut, plan_prologue
from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.binding_time import Binding, bindings
from harmonica_rt.plan.plan import Plan, build_plan
from harmonica_rt.plan.step_graph import StepGraph
from harmonica_rt.schedule import Schedule

SITES = ("attn", "cross", "time")
STEPS = 4


class Conditioned(nn.Module):
    """Latents [B, N, 8] that see the timestep [B], a prompt [B, L, 8], a ControlNet, and a site of time alone."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(16, 8))
        self.embed = nn.Linear(1, 8)
        self.mixed = nn.Linear(8, 24)
        self.keys = nn.Linear(8, 8)
        self.attn = nn.Linear(8, 8)
        self.cross = nn.Linear(8, 8)
        self.time = nn.Linear(8, 8)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        controlnet_residual: torch.Tensor,
    ) -> torch.Tensor:
        x = latents + self.position.sin()[: latents.shape[1]]
        time = self.embed(timestep[:, None])
        shift, scale, gate = self.mixed(time + prompt_embeds.mean(dim=1)).chunk(3, dim=1)
        x = x + gate[:, None] * self.attn(x * (1 + scale[:, None]) + shift[:, None])
        keys = self.keys(prompt_embeds)
        x = x + self.cross((x @ keys.transpose(1, 2)).softmax(dim=-1) @ keys)
        return x + self.time(time).tanh()[:, None] + controlnet_residual


def call_of(step: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "latents": torch.randn(2, 5, 8, generator=generator),
        "timestep": torch.full((2,), 1.0 - step / 10),
        "prompt_embeds": torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8),
        "controlnet_residual": torch.randn(2, 5, 8, generator=generator),
    }


def planned(compute: np.ndarray[Any, Any] | None = None) -> tuple[Conditioned, CapturedGraph, Plan, tuple[Role, ...]]:
    torch.manual_seed(0)
    model = Conditioned().eval()
    call = CallConvention(model).normalise((), call_of())
    captured = capture(model, call, SITES)
    mask = np.ones((STEPS, 3), bool) if compute is None else compute
    return model, captured, build_plan(captured, Schedule.from_array(mask, sites=SITES)), roles(call)


def body_targets(step: StepGraph) -> list[str]:
    return [str(n.target).removeprefix("aten.").partition(".")[0] for n in step.graph.nodes if n.op == "call_function"]


def test_roles_by_name() -> None:
    assert planned()[3] == (Role.LATENTS, Role.TIMESTEP, Role.REQUEST, Role.LATENTS)


def test_bindings_join_what_a_value_sees() -> None:
    _, captured, _, leaves = planned()
    late = {node for nodes in captured.site_outputs for node in nodes}
    bound = bindings(captured.graph, captured.inputs, leaves, {*captured.parameters, *captured.constants}, late)
    seen = {node.name: bound[node] for node in captured.graph.nodes}
    assert seen["sin"] == Binding.PARAMETERS
    assert seen["mean"] == Binding.REQUEST
    assert seen["linear"] == Binding.TIMESTEP
    assert seen["linear_1"] == Binding.TIMESTEP | Binding.REQUEST
    assert seen["tanh"] == Binding.LATENTS  # of a site that sees the timestep alone, but may be reused
    assert seen["controlnet_residual"] == Binding.LATENTS


def test_the_body_keeps_what_sees_the_latents() -> None:
    _, captured, plan, leaves = planned()
    prologue = plan_prologue(captured, plan.programs, leaves, STEPS)
    body = cut(plan.programs[0], prologue.names)
    kept = body_targets(body)
    assert kept.count("linear") == 3  # the sites; not the embedding, the modulation, the keys
    assert "sin" not in kept
    assert "mean" not in kept
    assert "chunk" not in kept
    assert "tanh" in kept
    assert "position" not in body.parameters
    assert {"attn.weight", "cross.bias", "time.weight"} <= set(body.parameters)


def values(prologue: Prologue, model: nn.Module, captured: CapturedGraph, call: dict[str, torch.Tensor]) -> Any:
    weights = dict(model.named_parameters())
    forecast = Forecast(Forecasts(STEPS), ForecastKey(None, 0), comparable=True)
    lowered = LoweredPrologue(prologue, captured.root)
    stream = StreamPrologue(lowered, lambda part: part.bind(weights, captured.constants), forecast)
    return stream.at(0, CallConvention(model).normalise((), call))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [10**9, 2000, 700, 0])
def test_bytes_stay_below_the_limit(limit: int) -> None:
    """Whatever stays in the body, and nothing is computed twice or lost: the result is the model's."""
    model, captured, plan, leaves = planned()
    prologue = plan_prologue(captured, plan.programs, leaves, STEPS, limit=limit)
    assert prologue.nbytes <= limit
    everything = plan_prologue(captured, plan.programs, leaves, STEPS)
    assert (len(prologue.names) == len(everything.names)) == (limit >= everything.nbytes)
    body = cut(plan.programs[0], prologue.names)
    call = call_of(1)
    with torch.no_grad():
        hoisted = values(prologue, model, captured, call)
        program = Program(body, captured.root)
        bound = program.bind(dict(model.named_parameters()), captured.constants)
        (result,) = program(bound, list(call.values()), [], [], [hoisted[name] for name in body.hoisted])
        torch.testing.assert_close(result, model(**call))


def test_views_of_one_value_count_once() -> None:
    model, captured, plan, leaves = planned()
    prologue = plan_prologue(captured, plan.programs, leaves, 1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.no_grad():
        hoisted = values(prologue, model, captured, call_of())
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for name, value in hoisted.items()
        if name in prologue.names
    }
    assert sum(size for address, size in held.items() if address not in weights) == prologue.nbytes
    assert len(held) < len(prologue.names)


def test_a_reused_site_takes_its_inputs_with_it() -> None:
    mask = np.ones((STEPS, 3), bool)
    mask[1] = [False, True, True]
    _, captured, plan, leaves = planned(mask)
    prologue = plan_prologue(captured, plan.programs, leaves, STEPS)
    full, reused = (cut(plan.programs[plan.steps[step].program], prologue.names) for step in (2, 1))
    assert len(reused.hoisted) < len(full.hoisted)  # shift and scale of the attention that is left out
    assert set(reused.hoisted) < set(full.hoisted)


class Transposed(nn.Module):
    """Uses a weight through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.attn(latents) @ self.weight.T


def test_views_of_weights_stay_in_the_body() -> None:
    model = Transposed().eval()
    call = CallConvention(model).normalise((), {"latents": torch.randn(2, 4, 8)})
    plan = build_plan(capture(model, call, ["attn"]), Schedule.every(2, steps=4, sites=["attn"]))
    prologue = plan_prologue(plan.captured, plan.programs, roles(call), 4)
    assert prologue.names == ()
    assert prologue.nbytes == 0
