"""The toy loop as a subject: fast, and it reads every kind of state."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.soak import changes, toy
from benchmarks.soak.loop import Loop, LoopInputs
from benchmarks.soak.samplers import LATE_SAMPLERS, NOISE_SAMPLERS, SAMPLERS
from benchmarks.soak.subject import PROMPT_FACTORS, Controls, OnStepEnd, Subject
from benchmarks.soak.world import Request


class _LoopControls(Controls):
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._base = loop.inputs.prompt.clone()

    def prompt(self, value: int, *, in_place: bool) -> None:
        inputs = self._loop.inputs
        if in_place:
            inputs.prompt.copy_(self._base * PROMPT_FACTORS[value])
        else:
            inputs.prompt = self._base * PROMPT_FACTORS[value]

    def guidance_off(self) -> None:
        self._loop.inputs.guidance = 1.0

    def stop(self) -> None:
        self._loop._interrupt = True


def _build(seed: int, variant: int, sampler: str) -> Loop:
    return Loop(
        toy.toy(seed),
        SAMPLERS[sampler](),
        prompt_name=toy.PROMPT_NAMES[variant % 3],
        two_calls=variant // 3 % 2 == 1,
        joined_once=variant // 6 % 2 == 1,
    )


def loop_inputs(request: Request, inference_steps: int) -> LoopInputs:
    """The inputs of a `Loop` for a request; latents and prompts are drawn from its seed."""
    generator = torch.Generator().manual_seed(request.seed)
    tokens = (4, 6)[request.size]
    latents = torch.randn(request.batch, tokens, toy.WIDTH, generator=generator)
    prompt, negative = (torch.randn(request.batch, 3, toy.WIDTH, generator=generator) for _ in range(2))
    return LoopInputs(
        latents=latents,
        prompt=prompt * PROMPT_FACTORS[request.prompt],
        negative=negative,
        guidance=2.5 if request.guided else 1.0,
        inference_steps=inference_steps,
        first=request.first,
        generator=generator,
    )


def _sample(loop: Loop, request: Request, inference_steps: int, on_step_end: OnStepEnd) -> torch.Tensor:
    inputs = loop_inputs(request, inference_steps)
    loop.inputs = inputs
    controls = _LoopControls(loop)
    return loop(inputs, lambda index, latents: on_step_end(index, latents, controls))


def _arguments(loop: Loop, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    latents, prompt = (torch.randn(1, count, toy.WIDTH, generator=generator) for count in (4, 3))
    return loop.arguments(latents, torch.tensor(100 + seed % 800), prompt)


LOOP = Subject(
    _build,
    _sample,
    _arguments,
    changes.OF_TOY,
    (*NOISE_SAMPLERS, "flow"),
    events=("raise", "outside", "gradient", "collect", "stop", "prompt", "prompt in place", "guidance"),
    late=LATE_SAMPLERS,
)
