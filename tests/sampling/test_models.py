"""Models compiled by themselves: one call per step, `reset()` between runs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.errors import HarmonicaError, RunError, ScheduleError, ScheduleMismatchError, SignatureError
from harmonica_rt.schedule import ModelInfo
from tests.models import Stack, stack, stack_call
from tests.tiny import random_schedule

STEPS = 4


def outputs(denoiser: Any, steps: int = STEPS, **sizes: int) -> list[torch.Tensor]:
    denoiser.reset()
    return [denoiser(**stack_call(step, **sizes)) for step in range(steps)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def model() -> Stack:
    return stack()


def test_called_like_the_model_and_equal_to_the_reference(model: Stack) -> None:
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule, strict=True)
    call = stack_call(0)
    assert torch.equal(compiled(call["latents"], call["timestep"]), model(**call))
    assert equal(outputs(compiled), outputs(hrt.reference(model, schedule)))
    assert torch.equal(model(**call), compiled.model(**call))  # the model itself is left alone


def test_attributes_are_the_models(model: Stack) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS))
    assert compiled.embed is model.embed
    assert list(compiled.parameters()) == list(model.parameters())
    assert compiled.to(torch.float64) is compiled
    assert model.embed.weight.dtype is torch.float64
    with pytest.raises(AttributeError, match="nonsense"):
        _ = compiled.nonsense


def test_used_up_steps_and_a_restart_without_reset_are_errors(model: Stack) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS))
    outputs(compiled)
    with pytest.raises(RunError, match="for 4 steps and they are over"):
        compiled(**stack_call(4))
    compiled.reset()
    compiled(**stack_call(0))
    compiled(**stack_call(1))
    with pytest.raises(RunError, match="against the order of this run"):
        compiled(**stack_call(0))
    assert equal(outputs(compiled), outputs(compiled))


def test_a_failed_step_poisons_its_run_and_no_other(model: Stack) -> None:
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule, strict=True)
    expected = outputs(compiled)
    compiled.reset()
    compiled(**stack_call(0))
    runtime = next(iter(compiled.engine.plans.values()))
    programs, index = runtime.lowered.lowering.programs, runtime.lowered.plan.steps[1].program
    program, programs[index] = programs[index], None
    with pytest.raises(AttributeError):
        compiled(**stack_call(1))
    programs[index] = program
    with pytest.raises(RunError, match="an earlier step of this run failed"):
        compiled(**stack_call(1))
    assert equal(outputs(compiled), expected)


def test_bad_arguments(model: Stack) -> None:
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule)
    with pytest.raises(SignatureError, match="takes no argument 'timestamp'"):
        compiled(torch.zeros(1, 4, 8), timestamp=1)
    with pytest.raises(HarmonicaError, match="'fast' is not known"):
        hrt.compile(model, schedule, lowering="fast")
    with pytest.raises(HarmonicaError, match="max_plans must be a whole number of at least 1"):
        hrt.compile(model, schedule, max_plans=0)
    with pytest.raises(HarmonicaError, match="choose one of the two"):
        hrt.compile(model, schedule, verify=True, debug=True)
    with pytest.raises(HarmonicaError, match="got 'model'; load it first"):
        hrt.compile("model", schedule)


def test_schedules_of_other_models_are_refused(model: Stack) -> None:
    schedule = random_schedule(model, STEPS)
    with pytest.raises(ScheduleMismatchError, match="made for a UNet, this is a Stack"):
        hrt.compile(model, schedule.with_provenance(model=ModelInfo("UNet")))
    with pytest.raises(ScheduleMismatchError, match="another config"):
        hrt.compile(model, schedule.with_provenance(model=ModelInfo("Stack", "sha256:0")))
    with pytest.raises(ScheduleMismatchError, match=r"no module blocks\.2\.attn"):
        hrt.compile(stack(depth=2), schedule)
    with pytest.raises(ScheduleError, match="lies inside"):
        Schedule.every(2, steps=2, sites=["blocks.0", "blocks.0.mlp"])


def test_training_mode_is_an_error_not_a_fallback(model: Stack) -> None:
    with pytest.raises(hrt.CaptureError, match=r"training mode: call model\.eval\(\) first"):
        hrt.compile(model.train(), random_schedule(model, STEPS))(**stack_call(0))


def test_plans_are_kept_up_to_a_limit(model: Stack, caplog: pytest.LogCaptureFixture) -> None:
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule, max_plans=2, strict=True)
    truth = hrt.reference(model, schedule)
    with caplog.at_level(logging.INFO, logger="harmonica_rt"):
        for batch in (1, 2, 3, 2, 1):
            assert equal(outputs(compiled, batch=batch), outputs(truth, batch=batch))
    assert len(compiled.report().plans) == 2
    assert sum("planned Stack" in line for line in caplog.messages) == 4  # 1, 2, 3, and 1 again
    assert sum("dropped the plan" in line for line in caplog.messages) == 2


class TestLiveModel:
    """Whatever happens to the model between runs shows in the next one."""

    @pytest.fixture
    def both(self, model: Stack) -> tuple[Any, Any]:
        schedule = random_schedule(model, STEPS)
        compiled = hrt.compile(model, schedule, strict=True)
        outputs(compiled)
        return compiled, hrt.reference(model, schedule)

    def check(self, both: tuple[Any, Any], before: list[torch.Tensor]) -> None:
        compiled, truth = both
        after = outputs(compiled)
        assert equal(after, outputs(truth))
        assert not equal(after, before)

    def test_in_place(self, model: Stack, both: tuple[Any, Any]) -> None:
        before = outputs(both[0])
        with torch.no_grad():
            model.blocks[0].attn.weight.mul_(2)
        self.check(both, before)

    def test_data(self, model: Stack, both: tuple[Any, Any]) -> None:
        before = outputs(both[0])
        model.blocks[0].attn.weight.data = torch.ones(8, 8)
        self.check(both, before)

    def test_another_parameter(self, model: Stack, both: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
        before = outputs(both[0])
        model.blocks[0].attn.weight = nn.Parameter(torch.ones(8, 8))
        self.check(both, before)
        assert not any("captured again" in line for line in caplog.messages)

    def test_another_module(self, model: Stack, both: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
        before = outputs(both[0])
        model.blocks[0].attn = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
        self.check(both, before)
        assert any("captured again: blocks.0.attn" in line for line in caplog.messages)

    def test_a_plain_attribute(self, model: Stack, both: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
        before = outputs(both[0])
        model.blocks[1].mlp[1].approximate = "tanh"
        self.check(both, before)
        assert any("blocks.1.mlp.1.approximate changed from none to tanh" in line for line in caplog.messages)

    def test_another_dtype(self, model: Stack, both: tuple[Any, Any]) -> None:
        compiled, truth = both
        compiled.to(torch.bfloat16)
        call = {name: tensor.to(torch.bfloat16) for name, tensor in stack_call(0).items()}
        compiled.reset()
        truth.reset()
        got = compiled(**call)
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got, truth(**call), rtol=0.05, atol=0.05)

    def test_changed_between_reset_and_the_first_call(self, model: Stack, both: tuple[Any, Any]) -> None:
        compiled, truth = both
        compiled.reset()
        truth.reset()
        model.blocks[1].mlp[1].approximate = "tanh"
        assert torch.equal(compiled(**stack_call(0)), truth(**stack_call(0)))

    def test_private_attributes_objects_and_plain_tensors(self) -> None:
        class Settings:
            factor = 1.0

        class Odd(Stack):
            def __init__(self) -> None:
                super().__init__()
                self._scale = 1.0
                self.settings = Settings()
                self.settings.factor = 1.0
                self.table = torch.ones(8)

            def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                return super().forward(latents, timestep) * self._scale * self.settings.factor * self.table

        torch.manual_seed(0)
        model = Odd().eval()
        schedule = random_schedule(model, STEPS)
        compiled, truth = hrt.compile(model, schedule, strict=True), hrt.reference(model, schedule)
        outputs(compiled)
        model._scale = 2.0
        assert equal(outputs(compiled), outputs(truth))
        model.settings.factor = 3.0
        assert equal(outputs(compiled), outputs(truth))
        model.table = torch.full((8,), 4.0)
        assert equal(outputs(compiled), outputs(truth))
        model.table.mul_(2)
        assert equal(outputs(compiled), outputs(truth))


class TestHooks:
    def test_hooks_of_the_model_run_around_the_plan(self, model: Stack) -> None:
        schedule = random_schedule(model, STEPS)
        compiled, expected = hrt.compile(model, schedule, strict=True), outputs(hrt.reference(model, schedule))
        seen: list[tuple[bool, list[str]]] = []
        model.register_forward_pre_hook(lambda m, a, k: seen.append((m is model, sorted(k))), with_kwargs=True)
        model.register_forward_hook(lambda m, a, output: output + 1)
        assert equal(outputs(compiled), [output + 1 for output in expected])
        assert seen == [(True, ["latents", "timestep"])] * STEPS

    def test_a_hook_that_raises_leaves_the_next_run_right(self, model: Stack) -> None:
        schedule = random_schedule(model, STEPS)
        compiled, expected = hrt.compile(model, schedule), outputs(hrt.reference(model, schedule))

        def stop(*_: object) -> None:
            raise KeyError("stop")

        handle = model.register_forward_pre_hook(stop)
        with pytest.raises(KeyError):
            compiled(**stack_call(0))
        handle.remove()
        assert equal(outputs(compiled), expected)

    def test_accelerate_hooks_run_around_the_plan(self, model: Stack) -> None:
        class Counting(ModelHook):
            calls = 0

            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                self.calls += 1
                return args, kwargs

        schedule = random_schedule(model, STEPS)
        expected = outputs(hrt.reference(model, schedule))
        compiled, hook = hrt.compile(model, schedule, strict=True), Counting()
        add_hook_to_module(model, hook)
        assert equal(outputs(compiled), expected)
        assert hook.calls == STEPS
        remove_hook_from_module(model)
        assert equal(outputs(compiled), expected)

    def test_hooks_inside_fall_back_with_a_reason(self, model: Stack) -> None:
        schedule = random_schedule(model, STEPS)
        model.blocks[0].mlp[1].register_forward_hook(lambda m, a, output: output * 2)
        compiled = hrt.compile(model, schedule)
        with pytest.warns(hrt.FallbackWarning, match=r"carry hooks.*blocks\.0\.mlp\.1"):
            got = outputs(compiled)
        assert equal(got, outputs(hrt.reference(model, schedule)))
        report = compiled.report()
        assert report.cached
        assert "hooks" in report.fallbacks[0]
        with pytest.raises(hrt.CaptureError, match="hooks"):
            hrt.compile(model, schedule, strict=True)(**stack_call(0))


class Branching(Stack):
    """Reads a value to decide what to do: no static graph can."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        latents = super().forward(latents, timestep)
        return latents if latents.sum().item() > -1e9 else -latents


def test_what_cannot_be_captured_runs_eagerly_with_the_same_schedule() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule)
    with pytest.warns(hrt.FallbackWarning, match="cannot be traced into one graph"):
        got = outputs(compiled)
    assert equal(got, outputs(hrt.reference(model, schedule)))
    assert str(compiled.report()).count("NOT COMPILED") == 1


class Twice(nn.Module):
    """One site that runs twice in a forward, and changes its first result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.body(latents)
        first.mul_(2)
        return {"sample": first + self.body(latents.tanh()), "first": first}


def test_a_site_that_runs_twice_and_is_changed_in_place() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    schedule = Schedule.every(2, steps=STEPS, sites=["body"])
    compiled, truth = hrt.compile(model, schedule, strict=True, debug=True), hrt.reference(model, schedule)
    for step in range(STEPS):
        got, expected = compiled(**stack_call(step)), truth(**stack_call(step))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


class Tied(Stack):
    """One block in three places."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.blocks = nn.ModuleList([self.blocks[0]] * 3)


def test_a_block_in_several_places_is_one_set_of_sites() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    assert hrt.find_sites(model) == ["blocks.0.attn", "blocks.0.mlp"]
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = hrt.compile(model, schedule, strict=True, debug=True)
    assert equal(outputs(compiled), outputs(hrt.reference(model, schedule)))


@pytest.mark.parametrize(("lowering", "tolerance"), [("plain", 0.0), ("fused", 0.05)])
def test_autocast_makes_a_plan_of_its_own(model: Stack, lowering: str, tolerance: float) -> None:
    schedule = random_schedule(model, STEPS)
    compiled, truth = hrt.compile(model, schedule, lowering=lowering, strict=True), hrt.reference(model, schedule)
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            torch.testing.assert_close(outputs(compiled), outputs(truth), rtol=tolerance, atol=tolerance)
    assert len(compiled.report().plans) == 2


def test_sites_in_a_nested_region_fall_back() -> None:
    class Region(Stack):
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(latents, timestep)

    model = Region().eval()
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule)
    with pytest.warns(hrt.FallbackWarning, match="nested graph"):
        got = outputs(compiled)
    assert equal(got, outputs(hrt.reference(model, schedule)))


class HandsOn(nn.Module):
    """A site that returns one of its inputs unchanged beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.site = PassesOn()

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        a, b = self.site(latents, latents * timestep[:, None, None])
        return a + b


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), y


def test_a_site_that_hands_an_input_on_is_refused() -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=["site"])
    for build in (hrt.compile, hrt.reference):
        with pytest.raises(hrt.CaptureError, match="returns one of its inputs unchanged"):
            build(HandsOn().eval(), schedule)(**stack_call(0))


def test_numbers_that_change_every_step_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Numbered(Stack):
        def forward(self, latents: torch.Tensor, timestep: float) -> torch.Tensor:  # type: ignore[override]
            return super().forward(latents, torch.full((len(latents),), timestep))

    model = Numbered().eval()
    compiled = hrt.compile(model, Schedule.every(2, steps=2, sites=hrt.find_sites(model)), strict=True)
    latents = stack_call(0)["latents"]
    compiled(latents, 1.0)
    assert torch.equal(compiled(latents, 0.5), model(latents, 0.5))
    assert any("timestep changes from step to step" in line for line in caplog.messages)


def test_methods_that_return_the_model_return_the_compiled_one(model: Stack) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS))
    assert compiled.half() is compiled
    assert compiled.eval() is compiled
    assert model.embed.weight.dtype is torch.float16


def test_verify_at_compile_checks_as_it_goes(model: Stack) -> None:
    schedule = random_schedule(model, STEPS)
    compiled = hrt.compile(model, schedule, verify=True)
    assert equal(outputs(compiled), outputs(hrt.reference(model, schedule)))


def test_report_before_and_after_a_run(model: Stack) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=hrt.find_sites(model))
    compiled = hrt.compile(model, schedule)
    assert "no plan yet" in str(compiled.report())
    outputs(compiled)
    report = compiled.report()
    assert report.cached
    assert report.last_calls == STEPS
    assert report.last_cur == schedule.cur == 0.5
    plan = report.plans[0]
    assert [(s.computed, s.reused, s.stored) for s in plan.steps] == [(6, 0, 6), (0, 6, 0)] * 2
    assert plan.steps[1].flops < plan.steps[0].flops == plan.full_flops
    assert plan.memory.arena_bytes == plan.memory.lower_bound_bytes == 6 * 2 * 4 * 8 * 4
    assert report.cache_bytes == plan.memory.arena_bytes
    assert "last run: 4 calls, 50.00% of entries reused" in str(report)


@pytest.mark.parametrize("door", ["compile", "reference", "torch.compile"])
def test_inputs_that_require_a_gradient_are_refused(door: str) -> None:
    model = stack()
    schedule = Schedule.every(2, steps=4, sites=hrt.find_sites(model))
    call = stack_call(0)
    if door == "torch.compile":
        denoiser: Any = torch.compile(model, backend="harmonica", options={"schedule": schedule})
    else:
        denoiser = hrt.compile(model, schedule) if door == "compile" else hrt.reference(model, schedule)
    with pytest.raises(hrt.HarmonicaError, match="latents requires a gradient"):
        denoiser(call["latents"].requires_grad_(), call["timestep"])
    with torch.no_grad():
        assert not denoiser(call["latents"], call["timestep"]).requires_grad
    call["latents"].requires_grad_(False)
