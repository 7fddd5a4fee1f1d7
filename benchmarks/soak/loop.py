"""A sampling loop over the toy model, as users write their own pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.soak.toy import Toy


@dataclass
class LoopInputs:
    """The inputs of one run of a `Loop`.

    Attributes:
        latents: [B, N, D].
        prompt: [B, L, D]; may be changed during the run.
        negative: [B, L, D]; may be changed during the run.
        guidance: guidance scale, 1 for none; may be changed during the run.
        inference_steps: number of steps that the scheduler is set to.
        first: step that the run starts with.
        generator: source of the sampler's noise.
    """

    latents: torch.Tensor
    prompt: torch.Tensor
    negative: torch.Tensor
    guidance: float
    inference_steps: int
    first: int
    generator: torch.Generator


class Loop:
    """A pipeline as users write them, with guidance in one call of the denoiser per step or in two.

    Args:
        transformer: the denoiser.
        scheduler: a scheduler of diffusers.
        prompt_name: argument of the denoiser that takes the prompt.
        two_calls: call the denoiser twice per guided step, in place of once with the batch doubled.
        joined_once: pass both prompts of a guided call in the same tensor at every step.

    Attributes:
        denoiser: compiled model that is called in place of `transformer`; None for none.
    """

    def __init__(
        self, transformer: Toy, scheduler: Any, *, prompt_name: str, two_calls: bool, joined_once: bool
    ) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        self.denoiser: Any = None
        self.inputs: LoopInputs
        self._interrupt = False
        self._prompt_name, self._two_calls, self._joined_once = prompt_name, two_calls, joined_once

    def __call__(self, inputs: LoopInputs, on_step_end: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        """Run all steps, with a callback after each; returns the last latents [B, N, D]."""
        for index, latents in self.steps(inputs):
            on_step_end(index, latents)
            if self._interrupt:
                break
        return latents

    def steps(self, inputs: LoopInputs) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each step's index and latents [B, N, D], so that the caller can pause the run between steps."""
        self.inputs, self._interrupt = inputs, False
        if self.denoiser is not None:
            self.denoiser.reset()
        self.scheduler.set_timesteps(inputs.inference_steps)
        if inputs.first:
            self.scheduler.set_begin_index(inputs.first)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": inputs.generator} if takes_generator else {}
        x = inputs.latents * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        for index, t in enumerate(self.scheduler.timesteps[inputs.first :]):
            with torch.no_grad():
                scale = getattr(self.scheduler, "scale_model_input", lambda latents, _: latents)
                noise = self._guided(scale(x, t), t)
                x = self.scheduler.step(noise, t, x, **extra, return_dict=False)[0]
            yield index, x

    def _guided(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inputs = self.inputs
        if inputs.guidance == 1:
            return self._denoised(x, t, inputs.prompt)
        if self._two_calls:
            negative, positive = self._denoised(x, t, inputs.negative), self._denoised(x, t, inputs.prompt)
        else:
            both = self._joined(inputs.negative, inputs.prompt)
            negative, positive = self._denoised(torch.cat([x, x]), t, both).chunk(2)
        return negative + inputs.guidance * (positive - negative)

    def _joined(self, negative: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Both prompts [2B, L, D]: with `joined_once` in the tensor of the previous step, else in a new one."""
        made_of = (negative, prompt, negative._version, prompt._version)
        kept = self.__dict__.get("_kept")
        if self._joined_once and kept is not None and all(a is b for a, b in zip(kept[0], made_of, strict=True)):
            found: torch.Tensor = kept[1]
            return found
        joined = torch.cat([negative, prompt])
        self._kept = (made_of, joined)
        return joined

    def _denoised(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        call = self.denoiser if self.denoiser is not None else self.transformer
        result: torch.Tensor = call(**self.arguments(x, t, prompt))
        return result

    def arguments(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of one call of the denoiser."""
        named = {"tokens": prompt} if self._prompt_name == "extras" else prompt
        return {"hidden_states": x, "timestep": t.expand(len(x)), self._prompt_name: named}
