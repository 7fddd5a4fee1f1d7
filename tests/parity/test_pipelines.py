"""Verification of whole pipelines, and of outputs that are not one float tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import fx, nn

import harmonica_rt as hrt
from harmonica_rt import Schedule, find_sites
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.indices import SlotId
from harmonica_rt.lower.plain import Program
from tests.models import Stack, stack, stack_call
from tests.tiny import built, families

STEPS = 4
DIT = families()["dit"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return built(DIT.build)


def verify(pipeline: Any, schedule: Schedule, **arguments: Any) -> hrt.ParityReport:
    return hrt.verify(pipeline, schedule, lowering="plain", num_inference_steps=STEPS, **DIT.guided, **arguments)


@pytest.mark.parametrize(("step", "site"), [(1, 0), (1, 3), (3, 2)])
def test_a_corrupted_slot_of_a_pipeline_is_named(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, step: int, site: int
) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer))
    original = PlanStream.run

    def corrupting(self: PlanStream[Any], now: Any, call: Any, *, catch_up: bool) -> Any:
        output = original(self, now, call, catch_up=catch_up)
        if now == step - 1:
            slots = {s.value.output.site: s.id for s in self.lowered.plan.table.slots if s.value.first == now}
            self.buffers.slots[SlotId(slots[site])].mul_(1 + 1e-3)
        return output

    monkeypatch.setattr(PlanStream, "run", corrupting)
    with pytest.raises(hrt.ParityError) as error:
        verify(pipeline, schedule)
    assert (error.value.step, error.value.site) == (step, schedule.sites[site])
    assert type(pipeline.scheduler) is DDIMScheduler  # plain again, the failure notwithstanding
    assert "_compiled_call_impl" not in pipeline.transformer.__dict__


def test_slots_that_change_places_are_found(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer))
    original = Program.__call__

    def swapped(self: Program, bound: Any, leaves: Any, reads: list[Any], *others: Any) -> Any:
        return original(self, bound, leaves, [*reads[1:], *reads[:1]], *others)

    monkeypatch.setattr(Program, "__call__", swapped)
    with pytest.raises(hrt.ParityError) as error:
        verify(pipeline, schedule)
    assert error.value.step == 1
    assert [step.ok for step in error.value.report.steps] == [True, False, True, False]


def sloppy(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Every program's outputs are off by a factor."""
    original = Program.__call__

    def run(self: Program, *args: Any) -> Any:
        return tuple(o * factor if isinstance(o, torch.Tensor) else o for o in original(self, *args))

    monkeypatch.setattr(Program, "__call__", run)


def test_an_error_in_the_last_operation_belongs_to_no_site(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sloppy(monkeypatch, 1 + 1e-6)
    with pytest.raises(hrt.ParityError) as error:
        verify(pipeline, Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer)))
    assert (error.value.step, error.value.site) == (0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_measured_tolerance_fails_a_sloppy_pipeline(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pipeline = DIT.build().to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer))
    report = verify(pipeline, schedule, tolerance="measured")
    assert report.tolerance == "measured"
    assert len(report.steps) == STEPS
    sloppy(monkeypatch, 1 + 2e-2)
    with pytest.raises(hrt.ParityError, match="measured"):
        verify(pipeline, schedule, tolerance="measured")


def test_a_run_that_strays_although_each_step_is_right_fails(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = Program.__call__

    def later(self: Program, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        outputs = original(self, *args)
        return outputs if calls <= STEPS else tuple(o * 1.01 for o in outputs)

    monkeypatch.setattr(Program, "__call__", later)
    with pytest.raises(hrt.ParityError) as error:
        verify(pipeline, Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer)))
    assert error.value.step is None
    assert all(step.same_bits for step in error.value.report.steps)
    assert error.value.report.trajectory_same_bits is False


class HandWritten:
    """A pipeline that takes no generator and returns a tensor."""

    def __init__(self) -> None:
        self.transformer = stack()
        self.scheduler = DDIMScheduler()

    def __call__(self, start: float) -> torch.Tensor:
        latents = stack_call(0)["latents"] * start
        self.scheduler.set_timesteps(STEPS)
        for timestep in self.scheduler.timesteps:
            noise = self.transformer(latents, timestep.expand(len(latents)).float() / 1000)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents


def test_a_pipeline_may_take_no_generator() -> None:
    pipeline = HandWritten()
    report = hrt.verify(pipeline, Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer)), start=0.5)
    assert len(report.steps) == STEPS
    assert report.trajectory_same_bits


def test_a_pipeline_that_cannot_be_captured_has_nothing_to_verify() -> None:
    pipeline = HandWritten()
    pipeline.transformer.blocks[0].register_forward_hook(lambda m, a, output: output)
    with pytest.raises(hrt.CaptureError, match="hooks"):
        hrt.verify(pipeline, Schedule.every(2, steps=STEPS, sites=find_sites(pipeline.transformer)), start=0.5)


class Several(Stack):
    """Returns floats, integers, booleans, and things that are no tensors."""

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> Any:
        x = super().forward(latents, timestep)
        return {"x": x, "where": x.argmax(-1), "sign": x > 0, "nothing": None, "name": "several"}


@pytest.mark.parametrize("tolerance", ["exact", "measured"])
def test_outputs_of_many_kinds_are_compared(monkeypatch: pytest.MonkeyPatch, tolerance: Any) -> None:
    torch.manual_seed(0)
    model = Several().eval()
    schedule = Schedule.every(2, steps=STEPS, sites=find_sites(model))
    calls = [stack_call(step) for step in range(STEPS)]
    assert hrt.verify(model, schedule, calls=calls, tolerance=tolerance).ok

    original = Program.__call__

    def off_by_one(self: Program, *args: Any) -> Any:
        return tuple(
            o + 1 if isinstance(o, torch.Tensor) and o.dtype is torch.int64 else o for o in original(self, *args)
        )

    monkeypatch.setattr(Program, "__call__", off_by_one)
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(model, schedule, calls=calls, tolerance=tolerance)
    assert error.value.step == 0


def test_nan_that_the_model_itself_gives_is_no_error() -> None:
    class Divides(Stack):
        def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return super().forward(latents, timestep) / (latents > 0)

    model = Divides().eval()
    calls = [{**stack_call(step), "latents": torch.zeros(2, 4, 8)} for step in range(2)]
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        assert model(**calls[0]).isnan().all()
    report = hrt.verify(model, Schedule.every(2, steps=2, sites=find_sites(model)), calls=calls)
    assert all(step.same_bits for step in report.steps)


def test_models_take_no_pipeline_arguments() -> None:
    model = stack()
    with pytest.raises(HarmonicaError, match="verify of a model takes no num_inference_steps"):
        hrt.verify(
            model, Schedule.every(2, steps=2, sites=find_sites(model)), calls=[stack_call(0)] * 2, num_inference_steps=2
        )


def test_a_program_with_a_changed_operator_names_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_rt.lower import plain

    original = plain.with_stores

    def without_gelu(step: Any, **options: Any) -> fx.Graph:
        graph = original(step, **options)
        last = [node for node in graph.nodes if node.target is torch.ops.aten.gelu.default][-1]
        last.replace_all_uses_with(last.args[0])
        graph.erase_node(last)
        return graph

    model = stack()
    monkeypatch.setattr(plain, "with_stores", lambda step, **o: (original if step.reads else without_gelu)(step, **o))
    with pytest.raises(hrt.ParityError) as error:
        hrt.verify(
            model,
            Schedule.every(2, steps=STEPS, sites=find_sites(model)),
            calls=[stack_call(step) for step in range(STEPS)],
        )
    assert (error.value.step, error.value.site) == (0, "blocks.2.mlp")
