"""Models by themselves: runs of other numbers of steps than there are schedules for."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from harmonica_rt import Schedule
from harmonica_rt.capture import captures as captures_module
from harmonica_rt.errors import ArgumentError, RunError, ScheduleMismatchError
from harmonica_rt.sampling.schedule_choice import MAX_KEPT, ScheduleChoice
from harmonica_rt.schedule import ScheduleSet
from tests.models import SITES, random_schedule, stack, stack_call

STEPS = 6


@pytest.fixture
def model() -> nn.Module:
    return stack()


@pytest.fixture
def schedule(model: nn.Module) -> Schedule:
    return random_schedule(model, STEPS).with_taylor()


def outputs(denoiser: Any, count: int, timesteps: list[int] | None = None) -> list[torch.Tensor]:
    denoiser.reset(timesteps, steps=count)
    return [denoiser(**stack_call(step)) for step in range(count)]


def plain(model: nn.Module, steps: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**stack_call(step)) for step in range(steps)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is captured."""
    seen: list[Any] = []
    capture = captures_module.capture_model

    def noted(*given: Any) -> Any:
        seen.append(given)
        return capture(*given)

    monkeypatch.setattr(captures_module, "capture_model", noted)
    return seen


@pytest.mark.parametrize(
    ("steps", "by"), [(1, "steps"), (4, "steps"), (5, "timesteps"), (9, "steps"), (13, "timesteps")]
)
def test_a_resampled_run_equals_the_reference(model: nn.Module, schedule: Schedule, steps: int, by: str) -> None:
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True, on_other_steps="resample")
    timesteps = None if by == "steps" else list(range(steps, 0, -1))
    expected = outputs(hrt.reference(model, schedule.resample(steps)), steps)
    for _ in range(2):
        assert equal(outputs(compiled, steps, timesteps), expected)
        assert equal(outputs(hrt.reference(model, schedule, on_other_steps="resample"), steps, timesteps), expected)
    report = compiled.report()
    assert (report.last_calls, report.last_steps, report.last_resampled_from) == (steps, steps, STEPS)
    assert report.last_cur == pytest.approx(schedule.resample(steps).cur)
    assert not report.last_uncached
    assert f"its schedule for {steps} steps was resampled from {STEPS} steps" in str(report)


@pytest.mark.parametrize("lowering", ["plain", "fused"])
def test_one_capture_serves_all_numbers_of_steps(
    model: nn.Module, schedule: Schedule, captures: list[Any], lowering: str
) -> None:
    compiled = hrt.compile(model, schedule, lowering=lowering, strict=True, on_other_steps="resample")
    for steps in (STEPS, 9, 4, STEPS, 9):
        outputs(compiled, steps)
    assert len(captures) == 1
    plans = [runtime.lowered.plan for runtime in compiled.plans.values()]
    assert {len(plan.steps) for plan in plans} == {STEPS, 9, 4}
    assert len({id(plan.captured.graph) for plan in plans}) == 1
    assert sorted(plan.times.capture > 0 for plan in compiled.report().plans) == [False, False, True]


def test_the_log_says_it_once(model: nn.Module, schedule: Schedule, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for how, said in (
        ("resample", "Stack: the schedule for 6 steps was resampled for a run of 9 steps"),
        ("plain", "Stack: the schedule is for 6 steps, so a run of 9 steps is uncached"),
    ):
        compiled = hrt.compile(model, schedule, lowering="plain", on_other_steps=how)
        for _ in range(3):
            outputs(compiled, 9)
        outputs(compiled, STEPS)
        assert sum(said in message for message in caplog.messages) == 1


def test_a_plain_run_is_that_of_the_model(model: nn.Module, schedule: Schedule, captures: list[Any]) -> None:
    compiled = hrt.compile(model, schedule, lowering="plain", strict=True, on_other_steps="plain")
    for steps in (9, 3):
        assert equal(outputs(compiled, steps), plain(model, steps))
        with pytest.raises(RunError, match=f"the run is for {steps} steps and they are over"):
            compiled(**stack_call(steps))
    assert not captures
    report = compiled.report()
    assert (report.last_calls, report.last_steps, report.last_cur, report.last_uncached) == (3, 3, 0.0, True)
    assert "no schedule is for its 3 steps, so it was uncached" in str(report)
    expected = outputs(hrt.reference(model, schedule), STEPS)
    assert equal(outputs(compiled, STEPS), expected)
    assert not compiled.report().last_uncached
    compiled.reset()  # as many steps as the schedule has, unless it is told
    assert equal([compiled(**stack_call(step)) for step in range(STEPS)], expected)


def test_other_steps_are_an_error_by_default(model: nn.Module, schedule: Schedule) -> None:
    for denoiser in (hrt.compile(model, schedule, lowering="plain"), hrt.reference(model, schedule)):
        hint = "compile with on_other_steps='resample'"
        with pytest.raises(ScheduleMismatchError, match=f"the schedule is for 6 steps, reset got steps=9; {hint}"):
            denoiser.reset(steps=9)
        with pytest.raises(ScheduleMismatchError, match="the schedule is for 6 steps, reset got 2 timesteps"):
            denoiser.reset([2.0, 1.0])
        outputs(denoiser, STEPS)


@pytest.mark.parametrize("how", ["error", "resample", "plain"])
def test_what_reset_refuses(model: nn.Module, schedule: Schedule, how: str) -> None:
    compiled = hrt.compile(model, schedule, lowering="plain", on_other_steps=how)
    for wrong in (0, -1, 2.0, True, "9"):
        with pytest.raises(ArgumentError, match="steps must be a whole number"):
            compiled.reset(steps=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="reset got steps=6 and 2 timesteps; pass one of the two"):
        compiled.reset([2.0, 1.0], steps=6)
    with pytest.raises(ScheduleMismatchError, match="reset got 0 timesteps"):
        compiled.reset([])
    compiled.reset([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], steps=6)


def test_an_unknown_way_is_refused(model: nn.Module, schedule: Schedule) -> None:
    for refused in (hrt.compile, hrt.reference):
        with pytest.raises(ArgumentError, match="on_other_steps 'ignore' is not known; choose one of error, resample"):
            refused(model, schedule, on_other_steps="ignore")
    with pytest.raises(ArgumentError, match="leaves nothing to compare"):
        hrt.verify(model, schedule, calls=[], on_other_steps="plain")


@pytest.mark.parametrize("how", ["error", "resample", "plain"])
def test_a_set_has_the_schedule_of_each_run(model: nn.Module, how: str) -> None:
    sites = hrt.find_sites(model, patterns=SITES)
    given = ScheduleSet([Schedule.every(2, steps=4, sites=sites), Schedule.every(3, steps=9, sites=sites)])
    compiled = hrt.compile(model, given, lowering="plain", strict=True, on_other_steps=how)
    assert compiled.schedule is given
    for schedule in given.schedules:
        expected = outputs(hrt.reference(model, schedule), schedule.steps)
        assert equal(outputs(compiled, schedule.steps), expected)
        assert compiled.report().last_resampled_from is None
    assert "2 schedules for 4, 9 steps, the first with CUR 50.00%" in str(compiled.report())
    with pytest.raises(ScheduleMismatchError, match=r"the schedules are for 4 and 9 steps: pass .* reset\(steps"):
        compiled.reset()
    if how == "error":
        with pytest.raises(ScheduleMismatchError, match="the schedules are for 4 and 9 steps, reset got steps=7"):
            compiled.reset(steps=7)
    else:
        schedule = Schedule.all_compute(steps=7, sites=sites) if how == "plain" else given.schedules[1].resample(7)
        assert equal(outputs(compiled, 7), outputs(hrt.reference(model, schedule), 7))
        assert compiled.report().last_resampled_from == (9 if how == "resample" else None)


def test_a_copy_keeps_its_way(model: nn.Module, schedule: Schedule) -> None:
    for denoiser in (
        hrt.compile(model, schedule, lowering="plain", on_other_steps="resample"),
        hrt.reference(model, schedule, on_other_steps="resample"),
    ):
        assert equal(outputs(copy.deepcopy(denoiser), 9), outputs(denoiser, 9))


def test_verify_takes_as_many_calls_as_the_run_has_steps(model: nn.Module, schedule: Schedule) -> None:
    calls = [stack_call(step) for step in range(9)]
    report = hrt.verify(model, schedule, calls=calls, lowering="plain", on_other_steps="resample")
    assert report.ok
    assert len(report.steps) == 9
    with pytest.raises(ArgumentError, match="calls holds 9 calls, the schedule has 6 steps"):
        hrt.verify(model, schedule, calls=calls, lowering="plain")


def test_with_verify_each_run_is_compared_under_its_schedule(model: nn.Module, schedule: Schedule) -> None:
    compiled = hrt.compile(model, schedule, lowering="plain", verify=True, on_other_steps="resample")
    for steps in (9, STEPS, 4):
        assert equal(outputs(compiled, steps), outputs(hrt.reference(model, schedule.resample(steps)), steps))


def test_a_model_that_cannot_be_captured_is_tried_once(schedule: Schedule) -> None:
    class Reads(type(stack())):  # type: ignore[misc]
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return super().forward(latents if float(latents.sum()) > 0 else latents + 0.0, timestep)

    torch.manual_seed(0)
    model = Reads().eval()
    compiled = hrt.compile(model, schedule, on_other_steps="resample")
    with pytest.warns(hrt.FallbackWarning):
        outputs(compiled, STEPS)
    for steps in (9, 4, STEPS):  # another warning would be an error
        assert equal(outputs(compiled, steps), outputs(hrt.reference(model, schedule.resample(steps)), steps))
    assert len(compiled.report().fallbacks) == 1


def test_few_resampled_schedules_are_kept() -> None:
    choice = ScheduleChoice(Schedule.every(2, steps=6, sites=["a"]), "resample", "Model")
    first = choice.of(7)
    for steps in range(8, 7 + MAX_KEPT):
        choice.of(steps)
        assert choice.of(7) is first
    for steps in range(100, 100 + MAX_KEPT):
        choice.of(steps)
    assert choice.of(7) is not first
    assert choice.of(7) == first


@pytest.mark.parametrize(
    ("asked", "left_out", "expected"),
    [
        (10, 0, 10),
        (10, 4, 10),  # the last rows of the schedule for all steps
        (14, 4, 10),  # the schedule for the steps that run
        (20, 10, 20),  # both: that for all steps
        (16, 10, 16),  # neither: image-to-image is no run of 6 steps
        (5, 0, 5),
    ],
)
def test_steps_that_a_run_leaves_out_make_no_other_number(asked: int, left_out: int, expected: int) -> None:
    given = ScheduleSet(Schedule.every(2, steps=steps, sites=["a"]) for steps in (10, 20))
    for how in ("resample", "plain"):
        assert ScheduleChoice(given, how, "Model").expected(asked, left_out) == expected
    fits = expected in given.steps
    assert (ScheduleChoice(given, "error", "Model").expected(asked, left_out) == expected) == fits
