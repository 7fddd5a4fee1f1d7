"""Runs one training iteration, ours or with the work of the released trainer, on the same pipeline and batch.

The released trainer (ModelTC/HarmoniCa) differs in three ways: the model's parameters are not frozen, so that their
gradients are computed and discarded; the teacher runs with gradients enabled, and the loss is differentiated through it
too; lambda costs a whole run from noise for every step. Router, sampler, batch and loss are the same. In forwards per
step, at 20 steps and a renewal every 500, it needs one for the student, one for the teacher, two or four for the
gradients and 0.8 for lambda; ours needs one, one, one and 0.4.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor

from benchmarks import models
from harmonica_rt import find_sites
from harmonica_rt.demo import bundled_model
from harmonica_training.cached_forward import Cache, CachedForward, detached, first_tensor, frozen
from harmonica_training.config import TrainConfig
from harmonica_training.denoising_loop import DenoiserCall, DenoisingLoop, StreamKey
from harmonica_training.digits import load_pipeline
from harmonica_training.iepo import ImageErrors
from harmonica_training.sdt import step_losses
from harmonica_training.settling import LOOK_EVERY
from harmonica_training.trainer import train


@dataclass(frozen=True)
class Case:
    """A pipeline with a batch.

    Attributes:
        name: model, steps and batch.
        loop: runs the pipeline's steps.
        cached: runs its denoiser with caching.
        inputs: arguments of the pipeline's call.
        samples: number of samples in the batch.
    """

    name: str
    loop: DenoisingLoop
    cached: CachedForward
    inputs: dict[str, Any]
    samples: int

    @property
    def scores(self) -> Tensor:
        """Random scores, `[steps, sites]`."""
        scores = torch.rand(self.loop.steps, len(self.cached.sites), generator=torch.Generator().manual_seed(0))
        scores[0] = 1.0
        return scores

    def generators(self) -> list[torch.Generator]:
        """New generators with the same seeds each time, one per sample."""
        return [torch.Generator().manual_seed(index) for index in range(self.samples)]


def bundled(samples: int, steps: int) -> Case:
    """The bundled model with guidance."""
    pipeline = load_pipeline(bundled_model())
    sites = find_sites(pipeline.transformer)
    loop = DenoisingLoop(pipeline, steps=steps, arguments={"guidance_scale": 2.0})
    inputs = {"class_labels": [index % 10 for index in range(samples)]}
    name = f"bundled, {steps} steps, batch {samples} (guidance: {2 * samples})"
    return Case(name, loop, CachedForward(pipeline.transformer, sites), inputs, samples)


def dit_xl_2(steps: int) -> Case:
    """DiT-XL/2 at 256 x 256, one sample with guidance, blocks checkpointed."""
    transformer = models.dit(layers=28, heads=16, head_dim=72)
    pipeline = DiTPipeline(transformer, AutoencoderKL(block_out_channels=(4,), norm_num_groups=2), DDIMScheduler())
    loop = DenoisingLoop(pipeline, steps=steps, arguments={"guidance_scale": 1.5})
    cached = CachedForward(transformer, find_sites(transformer), checkpointing=True)
    name = f"DiT-XL/2 256, {steps} steps, batch 1 (guidance: 2), checkpointing"
    return Case(name, loop, cached, {"class_labels": [1]}, 1)


def iteration(case: Case) -> Tensor:
    """One iteration of ours without lambda; returns the gradient with respect to the scores `[steps, sites]`."""
    with frozen(case.loop.denoiser):
        return step_losses(
            case.loop,
            case.cached,
            case.inputs,
            case.generators(),
            scores=case.scores,
            computes=(case.scores > 0.1).numpy(),
            holds="computed",
            precision=contextlib.nullcontext,
        ).by_score


def released_iteration(case: Case, *, through_teacher: bool) -> Tensor:
    """The same gradient `[steps, sites]`, with the work of the released trainer.

    `through_teacher=False` omits the gradient through the teacher, which changes only the parameters' gradients.
    """
    model, scores = case.loop.denoiser.eval(), case.scores.requires_grad_()
    caches: dict[StreamKey, Cache] = {}

    def denoise(call: DenoiserCall) -> Any:
        if call.step == 0:
            output, caches[call.stream] = case.cached.compute(call.forward)
            return output
        with torch.enable_grad():
            teacher = first_tensor(call.forward())  # its graph is kept until the end of the step, used or not
            computes = (scores[call.step] > 0.1).tolist()
            output, caches[call.stream] = case.cached.blend(
                call.forward, scores[call.step], computes, caches[call.stream], "computed"
            )
            target = teacher if through_teacher else teacher.detach()
            loss = (first_tensor(output) - target).square().mean()
        model.zero_grad()  # only now: the parameters' gradients of the previous step are held until here
        loss.backward()
        return detached(output)

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    case.loop.run(case.inputs, case.generators(), denoise)
    model.zero_grad()
    if scores.grad is None:
        raise RuntimeError("the released iteration gave no gradient")
    return scores.grad


def renewal(case: Case, *, share_prefixes: bool) -> Tensor:
    """Compute lambda once; returns one weight per step."""
    errors = ImageErrors(
        case.loop,
        case.cached,
        case.scores,
        (case.scores > 0.1).numpy(),
        case.inputs,
        case.generators,
        holds="computed",
        precision=contextlib.nullcontext,
    )
    return errors.weights("progressive", share_prefixes=share_prefixes)


def by_default(case: Case) -> float:
    """Mean seconds of an iteration of `train` with its defaults, over one period of its less frequent work.

    It trains the bundled model with as many samples and steps as `case`.
    """
    config = TrainConfig(steps=case.loop.steps, batch=case.samples, target_speedup=1.5, guidance=2.0)
    period = math.lcm(config.renew_every, LOOK_EVERY)
    history = train(load_pipeline(bundled_model()), replace(config, iterations=period)).history
    return sum(record.seconds for record in history) / period
