"""`torch.compile(model, backend="harmonica")`: models called by hand, one call per step."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import CaptureError, HarmonicaError, RunError
from tests.models import Stack, stack, stack_call
from tests.tiny import random_schedule

STEPS = 4


@pytest.fixture
def model() -> Stack:
    return stack(depth=2)


@pytest.fixture
def schedule(model: Stack) -> Schedule:
    return random_schedule(model, STEPS)


def compiled_of(model: nn.Module, schedule: Schedule, **options: Any) -> Any:
    given = {"schedule": schedule, "lowering": "plain", **options}
    return torch.compile(model, backend="harmonica", options=given)


def run(model: Any, steps: int = STEPS, **sizes: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**stack_call(step, **sizes)) for step in range(steps)]


def expected(model: nn.Module, schedule: Schedule, **sizes: int) -> list[torch.Tensor]:
    return run(hrt.reference(model, schedule), schedule.steps, **sizes)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_three_runs_of_twenty_steps_are_the_references_from_one_graph() -> None:
    model = stack()
    schedule = random_schedule(model, 20)
    compiled = torch.compile(
        model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"}, fullgraph=True
    )
    session = hrt.attach(compiled)
    for _ in range(3):
        session.reset()
        assert equal(run(compiled, 20), expected(model, schedule))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    report = session.report()
    assert (report.last_calls, report.last_catch_ups) == (20, ())
    assert report.last_cur == pytest.approx(schedule.cur)
    assert len(report.plans) == 1
    assert "last run: 20 calls" in str(report)


def test_the_default_lowering_is_the_one_of_compile(model: Stack, schedule: Schedule) -> None:
    compiled = torch.compile(model, backend="harmonica", options={"schedule": schedule})
    same = hrt.compile(model, schedule)
    with torch.no_grad():
        assert equal(run(compiled), run(same))


def test_calls_beyond_the_last_step_and_a_restart_without_reset_are_errors(model: Stack, schedule: Schedule) -> None:
    compiled = compiled_of(model, schedule)
    run(compiled)
    with pytest.raises(RunError, match=r"for 4 steps and they are over. Call reset\(\)"):
        run(compiled, 1)
    session = hrt.attach(compiled)
    session.reset()
    run(compiled, 2)
    with pytest.raises(RunError, match="against the order of this run"):
        run(compiled, 1)
    session.reset()
    assert equal(run(compiled), expected(model, schedule))


def test_grad_modes_share_one_session_and_one_plan(model: Stack, schedule: Schedule) -> None:
    compiled = compiled_of(model, schedule, debug=True)
    session = hrt.attach(compiled)
    modes: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad]
    got = []
    for step, mode in enumerate(modes):
        with mode():
            got.append(compiled(**stack_call(step)))
    assert equal(got, expected(model, schedule))
    assert not any(output.requires_grad for output in got)
    assert counters["stats"]["unique_graphs"] == 3
    assert len(session.report().plans) == 1
    assert session.report().last_catch_ups == ()


def test_other_strides_of_the_timestep_stay_in_the_run(model: Stack, schedule: Schedule) -> None:
    def calls() -> Iterator[dict[str, torch.Tensor]]:
        for step in range(STEPS):
            call = stack_call(step)
            yield {**call, "timestep": call["timestep"][:1].expand(2)} if step == 0 else call

    compiled, truth = compiled_of(model, schedule), hrt.compile(model, schedule, lowering="plain")
    with torch.no_grad():
        assert equal([compiled(**call) for call in calls()], [truth(**call) for call in calls()])
    assert hrt.attach(compiled).report().last_catch_ups == truth.report().last_catch_ups


def test_each_shape_gets_its_own_plan(model: Stack, schedule: Schedule) -> None:
    compiled = compiled_of(model, schedule)
    session = hrt.attach(compiled)
    for batch in (2, 3, 5, 3):
        session.reset()
        assert equal(run(compiled, batch=batch), expected(model, schedule, batch=batch))
    assert len(session.report().plans) == 3
    assert counters["stats"]["unique_graphs"] == 2  # the second one has a symbolic batch size


def test_a_run_uses_the_parameters_at_its_start(model: Stack, schedule: Schedule) -> None:
    compiled = compiled_of(model, schedule)
    session = hrt.attach(compiled)
    before = run(compiled)
    changes: list[Callable[[], object]] = [
        lambda: model.embed.weight.detach().mul_(2),
        lambda: setattr(model.embed.bias, "data", torch.ones(8)),
        lambda: setattr(model.blocks[0].attn, "weight", nn.Parameter(torch.eye(8))),
    ]
    for change in changes:
        change()
        session.reset()
        after = run(compiled)
        assert not equal(after, before)
        assert equal(after, expected(model, schedule))
        before = after


def test_two_models_of_one_class_do_not_share_runs() -> None:
    first, second = stack(seed=1), stack(seed=2)
    schedule = random_schedule(first, STEPS)
    mine, other = compiled_of(first, schedule), compiled_of(second, schedule)
    with torch.no_grad():
        got = [(mine(**stack_call(step)), other(**stack_call(step))) for step in range(STEPS)]
    assert equal([a for a, _ in got], expected(first, schedule))
    assert equal([b for _, b in got], expected(second, schedule))


def test_each_schedule_has_its_own_session(model: Stack, schedule: Schedule) -> None:
    other = Schedule.every(2, steps=STEPS, sites=schedule.sites)
    run(compiled_of(model, schedule), 2)
    assert equal(run(compiled_of(model, other)), expected(model, other))
    again = compiled_of(model, Schedule.every(2, steps=STEPS, sites=schedule.sites))
    with pytest.raises(RunError, match="they are over"):  # equal schedules share a session
        run(again, 1)


def test_an_unreferenced_model_is_freed_with_its_plans(schedule: Schedule) -> None:
    model = stack(depth=2)
    compiled = compiled_of(model, schedule)
    run(compiled, 2)  # a run that never ends
    gone, weight = weakref.ref(model), weakref.ref(model.embed.weight)
    del model, compiled
    gc.collect()
    assert gone() is None
    assert weight() is None


class WrappedForward(Stack):
    @torch.no_grad()
    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(latents, timestep) + torch.tensor(0.5)


def test_a_decorated_forward_takes_arguments_by_position() -> None:
    model = WrappedForward(depth=2).eval()
    schedule = random_schedule(model, STEPS)
    compiled = compiled_of(model, schedule)
    got = [compiled(call["latents"], timestep=call["timestep"]) for call in map(stack_call, range(STEPS))]
    assert equal(got, expected(model, schedule))
    (signature,) = hrt.attach(compiled).engine.plans.held
    assert "[2, 4, 8] float32, [2] float32" in str(signature)


class Breaks(Stack):
    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = self.embed(timestep[:, None])[:, None]
        latents = self.blocks[0](latents, scale)
        dynamo.graph_break()
        return self.blocks[1](latents, scale)


def test_a_graph_break_names_the_sites_that_are_missing() -> None:
    model = Breaks(depth=2).eval()
    compiled = compiled_of(model, random_schedule(model, STEPS))
    with pytest.raises(BackendCompilerFailed, match=r"lacks 2 of 4 sites: blocks\.1\.attn, blocks\.1\.mlp.*fullgraph"):
        run(compiled, 1)
    assert counters["graph_break"]


def test_dropout_left_in_training_mode_is_an_error(model: Stack, schedule: Schedule) -> None:
    model.blocks[0].mlp.append(nn.Dropout(0.5))  # type: ignore[union-attr,operator]
    assert not model.training
    with pytest.raises(CaptureError, match=r"training mode.*call model\.eval\(\)"):
        run(compiled_of(model, schedule))


def test_models_that_cannot_be_compiled_are_refused_with_the_reason(model: Stack, schedule: Schedule) -> None:
    with pytest.raises(BackendCompilerFailed, match=r"training mode.*call model\.eval\(\)"):
        run(compiled_of(stack(depth=2).train(), schedule))
    strange = Schedule.every(2, steps=STEPS, sites=["blocks.7.attn"])
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.7\.attn"):
        run(compiled_of(model, strange))
    function = torch.compile(lambda x: x + 1, backend="harmonica", options={"schedule": schedule})
    with pytest.raises(BackendCompilerFailed, match=r"uses no parameters.*; compile the model itself"):
        function(torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "needs a harmonica_rt.Schedule: torch.compile"),
        ({"schedule": "dit.json"}, "expected a harmonica_rt.Schedule, got 'dit.json'; read it first"),
        ({"lowering": "plain"}, "needs a harmonica_rt.Schedule: torch.compile"),
        ({"schedule": None, "shedule": 1}, "no option 'shedule'; it has schedule, lowering"),
    ],
)
def test_bad_options_are_refused(model: Stack, options: dict[str, Any] | None, message: str) -> None:
    compiled = torch.compile(model, backend="harmonica", options=options)
    with pytest.raises(BackendCompilerFailed, match=message):
        run(compiled)
    with pytest.raises(HarmonicaError, match=message):
        hrt.attach(compiled)


def test_unknown_lowerings_and_modes_are_refused(model: Stack, schedule: Schedule) -> None:
    with pytest.raises(BackendCompilerFailed, match="lowering 'fast' is not known"):
        run(compiled_of(model, schedule, lowering="fast"))
    with pytest.raises(BackendCompilerFailed, match="has no modes"):
        run(torch.compile(model, backend="harmonica", mode="reduce-overhead"))


def test_attach_takes_only_models_compiled_with_this_backend(model: Stack, schedule: Schedule) -> None:
    for other in (model, torch.compile(model, backend="eager"), stack()):
        with pytest.raises(HarmonicaError, match="Stack is not compiled with backend 'harmonica'"):
            hrt.attach(other)
    with pytest.raises(HarmonicaError, match=r"expected an nn\.Module or a diffusers pipeline, got 'pipe'"):
        hrt.attach("pipe")
    in_place = stack(depth=2)
    in_place.compile(backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    session = hrt.attach(in_place)
    got = run(in_place)
    assert session.report().last_calls == STEPS
    assert equal(got, expected(stack(depth=2), schedule))


def test_numbers_that_change_from_step_to_step_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(Stack):
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor, strength: str = "") -> torch.Tensor:
            return super().forward(latents, timestep) * len(strength)

    model = Scaled(depth=2).eval()
    compiled = compiled_of(model, Schedule.every(2, steps=2, sites=hrt.find_sites(model)))
    with caplog.at_level(logging.WARNING, logger="harmonica_rt"), torch.no_grad():
        for step in range(2):
            got = compiled(**stack_call(step), strength="x" * (step + 1))
    assert torch.equal(got, model(**stack_call(1), strength="xx"))  # computed in full, not reused wrongly
    assert "torch.compile graph changes from step to step" in caplog.text


class Scaled(Stack):
    """A model with numbers in places of all kinds: its own, those of a part of it, and those of an object it holds."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__(depth)
        self.factor = 0.5
        self.settings = Settings()
        self.norm = nn.LayerNorm(8)

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, strength: float = 1.0, times: int = 1
    ) -> torch.Tensor:
        """As `Stack`, scaled and normed."""
        result = super().forward(latents, timestep) * self.factor * strength
        result = result * self.settings.scale + self.settings.count * times
        return self.norm(result) + latents.shape[0] * latents.shape[1]


class Settings:
    """Numbers that are not in a module."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.count = 1


def set_numbers(model: Scaled, value: int) -> None:
    model.factor = model.settings.scale = 0.5 + value / 8
    model.settings.count = 2 + value
    model.norm.eps = 10.0**-value


@pytest.mark.parametrize(
    ("lowering", "dynamic"),
    [
        ("plain", None),
        ("fused", True),
        *(
            pytest.param(*rest, marks=pytest.mark.exhaustive)
            for rest in (("plain", True), ("plain", False), ("fused", None), ("fused", False))
        ),
    ],
)
def test_numbers_may_change_between_runs(dynamic: bool | None, lowering: str) -> None:
    """Dynamo makes them symbolic; each value gets the image that it gives uncompiled."""
    torch.manual_seed(0)
    model = Scaled(depth=1).eval()
    schedule = random_schedule(model, STEPS)
    options = {"schedule": schedule, "lowering": lowering}
    compiled = torch.compile(model, backend="harmonica", options=options, dynamic=dynamic)
    session = hrt.attach(compiled)
    for value in (0, 1, 2, 1, 3):
        set_numbers(model, value)
        truth = hrt.reference(model, schedule)
        session.reset()
        got = run(compiled)
        torch.testing.assert_close(got, run(truth), rtol=1e-5, atol=1e-5)
        assert session.report().last_catch_ups == ()


@pytest.mark.parametrize("dynamic", [None, True])
def test_arguments_and_sizes_may_change_between_runs(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = Scaled(depth=1).eval()
    schedule = random_schedule(model, STEPS)
    compiled = torch.compile(
        model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"}, dynamic=dynamic
    )
    session = hrt.attach(compiled)
    for strength, times, batch, tokens in ((1.0, 1, 2, 4), (0.5, 2, 3, 4), (0.25, 3, 3, 6), (0.5, 2, 5, 7)):
        calls = [
            {**stack_call(step, batch=batch, tokens=tokens), "strength": strength, "times": times}
            for step in range(STEPS)
        ]
        truth = hrt.reference(model, schedule)
        session.reset()
        with torch.no_grad():
            assert equal([compiled(**call) for call in calls], [truth(**call) for call in calls])
        assert session.report().last_catch_ups == ()


def test_a_step_with_other_numbers_is_computed_in_full() -> None:
    """A step with other numbers is computed in full; nothing of the steps before is reused for it."""
    torch.manual_seed(0)
    model = Scaled(depth=1).eval()
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = torch.compile(model, backend="harmonica", options={"schedule": schedule, "lowering": "plain"})
    hrt.attach(compiled)
    for step in range(STEPS):
        set_numbers(model, step)
        with torch.no_grad():
            assert torch.equal(compiled(**stack_call(step)), model(**stack_call(step)))
