"""Loops as people write them around a small model, and an oracle of hooks that shares nothing with the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import nn

from harmonica_rt import Schedule
from tests.models import Stack

STEPS = 6


class Conditioned(nn.Module):
    """A `Stack` that also takes a prompt [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Stack(depth=2).blocks
        self.time = nn.Linear(1, 8)
        self.text = nn.Linear(3, 8)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> Any:
        scale = (self.time(timestep.to(latents.dtype)[:, None]) + self.text(prompt))[:, None]
        for block in self.blocks:
            latents = block(latents, scale)
        return latents


def conditioned() -> Conditioned:
    torch.manual_seed(1)
    return Conditioned().eval()


def first_latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


PROMPT, OTHER = torch.zeros(2, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(5))


def model_time(timestep: torch.Tensor) -> torch.Tensor:
    return (timestep / 1000).float().expand(2)


Callback = Callable[[Any, int], None]


class Pipeline:
    """A model, a scheduler, and a loop in several shapes."""

    def __init__(self, model: nn.Module, scheduler: Any = None) -> None:
        self.transformer = model
        self.scheduler = DDIMScheduler() if scheduler is None else scheduler

    def __call__(self, callback: Callback | None = None, prompt: torch.Tensor = PROMPT, **others: Any) -> torch.Tensor:
        *_, latents = self.stepwise(prompt, callback, others.get("on_step"))
        return latents

    @torch.no_grad()
    def stepwise(self, prompt: torch.Tensor, *callbacks: Callback | None) -> Iterator[torch.Tensor]:
        """A generator: what a service that streams previews has."""
        latents = first_latents()
        self.scheduler.set_timesteps(STEPS)
        for step, timestep in enumerate(self.scheduler.timesteps):
            noise = self.transformer(latents, model_time(timestep), prompt)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
            for callback in callbacks:
                if callback is not None:
                    callback(self, step)
            yield latents


class Oracle:
    """Calls a plain model under a schedule, in the steps and streams that it is told."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self._model = model
        self._schedule = schedule
        self._features: dict[Any, dict[str, tuple[int, torch.Tensor]]] = {}

    def __call__(self, step: int, stream: Any, *args: torch.Tensor) -> torch.Tensor:
        """The call of a stream in a step; what it lacks makes it compute in full."""
        held, compute = self._features.setdefault(stream, {}), self._schedule.compute[: step + 1]
        wanted = {
            site: int(np.flatnonzero(compute[:, column])[-1])
            for column, site in enumerate(self._schedule.sites)
            if not compute[-1, column]
        }
        fresh = all(site in held and held[site][0] >= source for site, source in wanted.items())

        def ran(site: str) -> Callable[..., torch.Tensor | None]:
            def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
                if fresh and site in wanted:
                    return held[site][1]
                held[site] = (step, output.clone())
                return None

            return hook

        hooks = [self._model.get_submodule(site).register_forward_hook(ran(site)) for site in self._schedule.sites]
        try:
            with torch.no_grad():
                output: torch.Tensor = self._model(*args)
        finally:
            for hook in hooks:
                hook.remove()
        return output


def expected_run(model: nn.Module, schedule: Schedule, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    """What `Pipeline` gives under the schedule."""
    oracle, scheduler, latents = Oracle(model, schedule), DDIMScheduler(), first_latents()
    scheduler.set_timesteps(STEPS)
    for step, timestep in enumerate(scheduler.timesteps):
        noise = oracle(step, 0, latents, model_time(timestep), prompt)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents
