"""`sample` against the loops of diffusers' pipelines, with schedules that reuse, and against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

import harmonica_rt as hrt
from harmonica_rt.errors import ArgumentError, RunError, SamplerError
from harmonica_rt.schedule import Schedule
from tests import tiny
from tests.models import random_schedule
from tests.sampling.loops import PROMPT, Pipeline, conditioned, expected_run, first_latents

STEPS = 6


@dataclass(frozen=True)
class Case:
    """A pipeline, the latents that one run of it ends with, and the same run for `sample`.

    Attributes:
        pipeline: makes it, with the same parameters every time.
        run: runs a pipeline; returns its final latents.
        begin: sets the timesteps of a pipeline's scheduler as the pipeline does.
        latents: what the run begins with.
        arguments: of `sample`.
    """

    pipeline: Callable[[], Any]
    run: Callable[[Any], torch.Tensor]
    begin: Callable[[Any], None]
    latents: torch.Tensor
    arguments: dict[str, Any]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def set_steps(scheduler: Any) -> None:
    scheduler.set_timesteps(STEPS)


def dit() -> Case:
    """DDIM, guidance with the conditional half first, a pipeline that returns images only."""

    def pipeline() -> Any:
        made = tiny.built(tiny.dit)
        made.scheduler = d.DDIMScheduler(clip_sample=False)
        return made

    def run(pipeline: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        decode = pipeline.vae.decode
        pipeline.vae.decode = lambda latents: (seen.append(latents), decode(latents))[1]
        tiny.sample(pipeline, STEPS, class_labels=[1, 2], guidance_scale=2.0)
        return seen[0] * pipeline.vae.config.scaling_factor

    labels = torch.tensor([1, 2, 1000, 1000])
    arguments = {"class_labels": labels, "guidance_scale": 2.0, "conditional_first": True}
    return Case(pipeline, run, set_steps, noise(2, 4, 4, 4), arguments)


def pixart() -> Case:
    """DPM-Solver++, guidance with the unconditional half first, a learned variance."""
    given = tiny.families()["pixart-alpha"].guided

    def run(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents: torch.Tensor = pipeline(
            num_inference_steps=STEPS, generator=generator, output_type="latent", **given, guidance_scale=4.5
        ).images
        return latents

    both = {
        name: torch.cat([given[f"negative_{of}"], given[of]])
        for name, of in (
            ("encoder_hidden_states", "prompt_embeds"),
            ("encoder_attention_mask", "prompt_attention_mask"),
        )
    }
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "guidance_scale": 4.5}
    return Case(lambda: tiny.built(tiny.pixart_alpha), run, set_steps, noise(1, 4, 8, 8), {**both, **extra})


def flux() -> Case:
    """Flow matching with shifted sigmas, guidance as an argument of the model, timesteps in another scale."""
    given = tiny.families()["flux"].unguided
    pipeline = tiny.built(tiny.flux)

    def run(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents: torch.Tensor = pipeline(
            num_inference_steps=STEPS, generator=generator, output_type="latent", guidance_scale=3.5, **given
        ).images
        return latents

    def begin(scheduler: Any) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=calculate_shift(16))

    arguments = {
        "encoder_hidden_states": given["prompt_embeds"],
        "pooled_projections": given["pooled_prompt_embeds"],
        "txt_ids": torch.zeros(5, 3),
        "img_ids": pipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32),
        "guidance": torch.full([1], 3.5),
        "model_timestep": lambda t: t / 1000,
    }
    packed = pipeline._pack_latents(noise(1, 1, 8, 8), 1, 1, 8, 8)
    return Case(lambda: tiny.built(tiny.flux), run, begin, packed, arguments)


@pytest.mark.parametrize("made", [dit, pixart, flux])
def test_it_gives_what_the_pipeline_gives_under_a_schedule_that_reuses(made: Callable[[], Case]) -> None:
    case = made()
    pipeline = case.pipeline()
    schedule = random_schedule(pipeline.transformer, STEPS, seed=3)
    expected = case.run(hrt.reference(pipeline, schedule))
    model = case.pipeline().transformer
    scheduler = case.pipeline().scheduler
    case.begin(scheduler)
    with torch.no_grad():
        reference = hrt.reference(model, schedule).sample(case.latents, scheduler, **case.arguments)
        assert same(reference, expected)
        for lowering in ("plain", "fused"):
            compiled = hrt.compile(model, schedule, lowering=lowering, strict=True)
            found = compiled.sample(case.latents, scheduler, **case.arguments)
            assert torch.equal(found, reference) or (lowering == "fused" and same(found, reference))
            assert found.dtype == case.latents.dtype


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two runs in fp32 agree up to rounding, which six steps of a random model amplify."""
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("made", [dit, pixart, flux])
def test_in_half_precision_it_is_no_further_from_the_truth_than_the_pipelines_loop(made: Callable[[], Case]) -> None:
    """The truth is the run in fp32; the loop of diffusers rounds its latents to bf16 in every step."""
    case = made()
    exact, half = case.pipeline(), case.pipeline().to(torch.bfloat16)
    schedule = Schedule.all_compute(steps=STEPS, sites=hrt.find_sites(exact.transformer))
    case.begin(exact.scheduler), case.begin(half.scheduler)
    compiled = hrt.compile(half.transformer, schedule, lowering="plain", strict=True)

    def in_half(value: Any) -> Any:
        return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    arguments = {name: in_half(value) for name, value in case.arguments.items()}
    with torch.no_grad():
        truth = hrt.reference(exact.transformer, schedule).sample(case.latents, exact.scheduler, **case.arguments)
        found = compiled.sample(case.latents.to(torch.bfloat16), half.scheduler, **arguments)
        loop = loop_of_diffusers(half.transformer, half.scheduler, case.latents.to(torch.bfloat16), **arguments)
    assert found.dtype == torch.bfloat16
    errors = [(each.float() - truth).pow(2).mean().sqrt() for each in (found, loop)]
    assert errors[0] <= 2 * errors[1]


def loop_of_diffusers(
    model: Any,
    scheduler: Any,
    latents: torch.Tensor,
    guidance_scale: float | None = None,
    conditional_first: bool = False,
    model_timestep: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    **conditioning: Any,
) -> torch.Tensor:
    """The loop as pipelines write it, for schedulers that do not scale the model's input."""
    for t in scheduler.timesteps:
        given = latents if guidance_scale is None else torch.cat([latents] * 2)
        timestep = model_timestep(t.expand(len(given)))
        output = model(given, timestep=timestep, return_dict=False, **conditioning)[0]
        if guidance_scale is not None:
            one, other = output.chunk(2)
            conditional, unconditional = (one, other) if conditional_first else (other, one)
            output = unconditional + guidance_scale * (conditional - unconditional)
        output = output[:, : latents.shape[1]]
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def scheduler_of(steps: int = STEPS) -> Any:
    scheduler = d.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def unclipped_pipeline(model: nn.Module) -> Pipeline:
    return Pipeline(model, d.DDIMScheduler(clip_sample=False))


def thousandths(timesteps: torch.Tensor) -> torch.Tensor:
    return (timesteps / 1000).float()


def sampled(model: Any, prompt: torch.Tensor = PROMPT, **others: Any) -> torch.Tensor:
    found: torch.Tensor = model.sample(
        first_latents(), scheduler_of(), prompt=prompt, model_timestep=thousandths, **others
    )
    return found


@pytest.fixture
def model() -> nn.Module:
    return conditioned()


@torch.no_grad()
def test_in_a_compiled_pipeline_it_is_a_run_of_its_own(model: nn.Module) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    expected = unclipped_pipeline(hrt.reference(model, schedule))()
    pipeline = hrt.compile(unclipped_pipeline(model), schedule, strict=True)
    compiled: Any = hrt.get_compiled(pipeline)
    for _ in range(2):
        assert same(sampled(compiled), expected)
        assert compiled.stats.calls == STEPS
        assert same(pipeline(), expected)


@torch.no_grad()
def test_in_a_callback_it_is_refused_and_the_run_of_the_pipeline_goes_on(model: nn.Module) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    pipeline = hrt.compile(unclipped_pipeline(model), schedule, strict=True)
    compiled: Any = hrt.get_compiled(pipeline)

    def callback(_: Any, step: int) -> None:
        if step < STEPS - 1:  # then it is over
            with pytest.raises(RunError, match="a run of a pipeline is under way"):
                sampled(compiled)

    assert same(pipeline(callback), unclipped_pipeline(hrt.reference(model, schedule))())


@torch.no_grad()
@pytest.mark.parametrize("in_pipeline", [True, False], ids=["pipeline", "model"])
def test_nothing_goes_on_with_a_run_that_failed(model: nn.Module, in_pipeline: bool) -> None:
    schedule = Schedule.every(STEPS, steps=STEPS, sites=hrt.find_sites(model))
    pipeline = hrt.compile(unclipped_pipeline(model), schedule, strict=True) if in_pipeline else None
    compiled: Any = hrt.get_compiled(pipeline) if in_pipeline else hrt.compile(model, schedule, strict=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.register_forward_hook(stop)  # behind the call of the first step, not within it
    with pytest.raises(KeyboardInterrupt):
        sampled(compiled)
    hook.remove()
    call = (2 * first_latents(), torch.full((2,), 0.9), PROMPT)
    if in_pipeline:
        assert torch.equal(compiled(*call), model(*call))
    else:
        with pytest.raises(RunError, match="failed"):
            compiled(*call)
    assert same(sampled(compiled), sampled(hrt.reference(model, schedule)))


@torch.no_grad()
def test_the_default_device_does_not_matter(model: nn.Module) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled = hrt.compile(model, schedule, strict=True)
    expected = sampled(compiled)
    scheduler = d.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    latents = first_latents()
    with torch.device("meta"):
        for _ in range(2):  # its table is found, and known
            got = compiled.sample(latents, scheduler, prompt=PROMPT, model_timestep=thousandths)
            assert got.device == expected.device


@torch.no_grad()
def test_a_loop_whose_run_it_interrupts_must_begin_anew(model: nn.Module) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True)
    compiled.reset()
    call = (first_latents(), torch.full((2,), 0.9), PROMPT)
    compiled(*call)
    sampled(compiled)
    with pytest.raises(RunError, match=r"another had begun|are over"):
        compiled(*call)


@torch.no_grad()
def test_hooks_of_the_model_run_in_every_step(model: nn.Module) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1), lowering="plain", strict=True)
    expected = sampled(compiled)
    calls: list[object] = []

    def hook(module: nn.Module, *_: Any) -> None:
        calls.append(module)

    model.register_forward_hook(hook)
    assert torch.equal(sampled(compiled), expected)
    assert calls.count(model) == STEPS


@torch.no_grad()
def test_image_to_image_takes_the_last_steps_of_the_schedule(model: nn.Module) -> None:
    schedule = random_schedule(model, STEPS, seed=1)
    compiled, truth = hrt.compile(model, schedule, strict=True), hrt.reference(model, schedule)
    assert same(sampled(compiled, begin_index=3), sampled(truth, begin_index=3))
    assert compiled.stats is not None
    assert (compiled.stats.first, compiled.stats.calls) == (3, STEPS - 3)
    late, plain = Schedule.all_compute(steps=STEPS, sites=schedule.sites), scheduler_of()
    latents = first_latents()
    for t in plain.timesteps[3:]:
        latents = plain.step(model(latents, thousandths(t).expand(2), PROMPT), t, latents).prev_sample
    assert same(sampled(hrt.compile(model, late, strict=True), begin_index=3), latents)


@torch.no_grad()
def test_latents_may_lie_in_memory_as_they_like(model: nn.Module) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True)
    latents = first_latents().transpose(1, 2).contiguous().transpose(1, 2)
    found = compiled.sample(latents, scheduler_of(), prompt=PROMPT, model_timestep=thousandths)
    assert compiled.stats is not None
    assert (len(compiled.plans), compiled.stats.catch_ups) == (1, [])
    assert same(found, sampled(compiled))


@torch.no_grad()
def test_the_oracle_of_hooks_agrees(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = random_schedule(model, STEPS, seed=4)
    monkeypatch.setattr("tests.sampling.loops.DDIMScheduler", lambda: d.DDIMScheduler(clip_sample=False))
    expected = expected_run(model, schedule)
    assert same(sampled(hrt.compile(model, schedule, strict=True)), expected)


def test_the_scheduler_and_the_latents_are_left_as_they_were(model: nn.Module) -> None:
    compiled = hrt.compile(model, random_schedule(model, STEPS, seed=1), strict=True)
    scheduler, latents = d.DPMSolverMultistepScheduler(), first_latents()
    scheduler.set_timesteps(STEPS)
    before = {name: value for name, value in vars(scheduler).items()}
    with torch.no_grad():
        compiled.sample(latents, scheduler, prompt=PROMPT, model_timestep=thousandths)
    assert all(value is before[name] for name, value in vars(scheduler).items())
    assert scheduler.model_outputs == [None, None]
    assert torch.equal(latents, first_latents())


class TestWhatItRefuses:
    def test_options(self, model: nn.Module) -> None:
        compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
        for message, options in {
            "guidance_scale must be a finite number": {"guidance_scale": "7"},
            "conditional_first must be True or False": {"conditional_first": 1},
            "begin_index must be a whole number": {"begin_index": 1.5},
            "sample\\(\\) passes timestep to the model itself": {"timestep": torch.ones(2)},
        }.items():
            with pytest.raises(ArgumentError, match=message):
                sampled(compiled, **options)
        for change in (7, lambda t: t[:2]):
            with pytest.raises(ArgumentError, match="model_timestep"):
                compiled.sample(first_latents(), scheduler_of(), prompt=PROMPT, model_timestep=change)
        with pytest.raises(ArgumentError, match="latents must be a tensor of floating-point numbers"):
            compiled.sample([1.0], scheduler_of(), prompt=PROMPT)
        with pytest.raises(ArgumentError, match="begin_index 6 leaves none"):
            sampled(compiled, begin_index=STEPS)

    def test_latents_that_require_a_gradient(self, model: nn.Module) -> None:
        compiled = hrt.compile(model, random_schedule(model, STEPS), strict=True)
        with pytest.raises(RunError, match="latents requires a gradient"):
            compiled.sample(first_latents().requires_grad_(), scheduler_of(), prompt=PROMPT)
        assert not sampled(compiled).requires_grad  # with gradients on

    def test_models_of_other_shapes(self) -> None:
        class Timeless(nn.Module):
            def forward(self, latents: torch.Tensor) -> torch.Tensor:
                return latents

        class Halving(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([nn.Linear(8, 8)])

            def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = self.blocks[0](latents)[:, ::2] * timestep[:, None, None]
                return found

        halving = Halving().eval()
        schedule = Schedule.all_compute(steps=STEPS, sites=("blocks.0",))
        with pytest.raises(SamplerError, match="returned \\[2, 2, 8\\] for latents \\[2, 4, 8\\]"):
            hrt.compile(halving, schedule, strict=True).sample(first_latents(), scheduler_of())
        with pytest.raises(ArgumentError, match="needs a model that takes latents and a timestep"):
            hrt.reference(nn.Sequential(Timeless()), Schedule.all_compute(steps=STEPS, sites=("0",))).sample(
                first_latents(), scheduler_of()
            )
