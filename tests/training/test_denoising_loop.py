"""A run of the loop is a run of the pipeline itself: same numbers, nothing of the pipeline changed; runs may nest."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as d
import pytest
import torch

from harmonica_training.denoising_loop import DenoiserCall, DenoisingLoop
from harmonica_training.errors import TrainingError
from tests import tiny

SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: d.DDIMScheduler(),
    "dpm-solver++": lambda: d.DPMSolverMultistepScheduler(),
    "heun": lambda: d.HeunDiscreteScheduler(),
}


def generators(count: int, seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def plain(call: DenoiserCall) -> Any:
    return call.forward()


def latents_of(pipeline: Any, steps: int, count: int, **arguments: Any) -> torch.Tensor:
    """What the pipeline's scheduler gave last, in a run of the pipeline by its user."""
    seen: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen.append(result[0])
        return result

    watched.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    pipeline.scheduler.step = watched
    pipeline(num_inference_steps=steps, generator=generators(count), output_type="np", **arguments)
    del pipeline.scheduler.step
    return seen[-1]


@pytest.mark.parametrize("family", sorted(tiny.families()))
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_a_run_of_the_loop_gives_the_latents_of_the_pipeline(family: str, guided: bool) -> None:
    described = tiny.families()[family]
    arguments = described.guided if guided else described.unguided
    pipeline = tiny.built(described.build)
    count = len(arguments.get("class_labels", [0]))
    expected = latents_of(pipeline, 5, count, **arguments)
    assert torch.equal(DenoisingLoop(pipeline, steps=5).run(arguments, generators(count), plain), expected)


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_a_run_of_the_loop_gives_the_same_latents_under_every_scheduler(scheduler: str) -> None:
    pipeline = tiny.built(tiny.dit)
    pipeline.scheduler = SCHEDULERS[scheduler]()
    arguments = {"class_labels": [1, 2], "guidance_scale": 2.0}
    expected = latents_of(pipeline, 4, 2, **arguments)
    loop = DenoisingLoop(pipeline, steps=4, arguments={"guidance_scale": 2.0})
    calls: list[int] = []

    def counted(call: DenoiserCall) -> Any:
        calls.append(call.step)
        return call.forward()

    assert torch.equal(loop.run({"class_labels": [1, 2]}, generators(2), counted), expected)
    timesteps, _ = loop.probe({"class_labels": [1]}, generators(1), lambda call: None)
    assert calls == list(range(len(timesteps)))  # Heun: 7 steps (NFE) for 4 inference steps
    assert len(timesteps) == (7 if scheduler == "heun" else 4)


@pytest.mark.parametrize("scheduler", [d.DDPMScheduler, d.SASolverScheduler])
def test_added_noise_is_the_samples_own(scheduler: Any) -> None:
    pipeline = tiny.dit()  # its pipeline hands no generator to the scheduler
    pipeline.scheduler = scheduler()
    loop = DenoisingLoop(pipeline, steps=4, arguments={"guidance_scale": 2.0})
    both = loop.run({"class_labels": [1, 2]}, generators(2), plain)
    assert torch.equal(loop.run({"class_labels": [1, 2]}, generators(2), plain), both)
    for index, label in enumerate([1, 2]):
        alone = loop.run({"class_labels": [label]}, generators(1, seed=3 + index), plain)
        torch.testing.assert_close(alone[:1], both[index : index + 1], rtol=1e-4, atol=1e-4)


def test_runs_of_the_loop_nest_and_leave_the_pipeline_alone() -> None:
    pipeline = tiny.dit()
    loop = DenoisingLoop(pipeline, steps=3)
    inputs = {"class_labels": [1]}
    alone = loop.run(inputs, generators(1), plain)
    inner: list[torch.Tensor] = []

    def nesting(call: DenoiserCall) -> Any:
        inner.append(loop.run(inputs, generators(1), plain))
        return call.forward()

    scheduler, timesteps = pipeline.scheduler, pipeline.scheduler.timesteps.clone()
    assert torch.equal(loop.run(inputs, generators(1), nesting), alone)
    assert all(torch.equal(latents, alone) for latents in inner)
    assert pipeline.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, timesteps)
    assert "step" not in vars(scheduler)
    assert "forward" not in vars(pipeline.transformer)


@pytest.mark.parametrize("family", ["dit", "pixart-alpha", "flux"])
def test_windows_join_to_a_whole_run(family: str) -> None:
    described = tiny.families()[family]
    pipeline = described.build()
    if family == "pixart-alpha":
        pipeline.scheduler = d.DDIMScheduler()  # solvers of higher order begin a window without their history
    arguments = {**described.unguided, "class_labels": [1]} if family == "dit" else described.unguided
    loop = DenoisingLoop(pipeline, steps=5)
    whole = loop.run(arguments, generators(1), plain)
    first = loop.run(arguments, generators(1), plain, window=(0, 2))
    assert not torch.equal(first, whole)
    assert torch.equal(loop.run(arguments, generators(1), plain, window=(2, 5), start=first), whole)


def test_bad_input_is_refused() -> None:
    pipeline = tiny.dit()
    with pytest.raises(TrainingError, match="DiTPipeline takes no argument hight"):
        DenoisingLoop(pipeline, steps=3, arguments={"hight": 64})
    with pytest.raises(TrainingError, match="has no denoiser"):
        DenoisingLoop(object(), steps=3)
    with pytest.raises(TrainingError, match="no steps 2 to 5"):
        DenoisingLoop(pipeline, steps=3).run({"class_labels": [1]}, generators(1), plain, window=(2, 6))
