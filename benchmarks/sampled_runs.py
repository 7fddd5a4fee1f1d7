"""A run of `sample` in three ways: a loop of calls and scheduler steps, `sample` step by step, and as one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from harmonica_rt.execute import whole_run_stream

LOOP, STEPS, WHOLE = "calls and the scheduler's steps", "sample, step by step", "sample, all steps as one graph"

Run = Callable[[], torch.Tensor]


def ways(
    compiled: Any, latents: torch.Tensor, scheduler: Any, conditioning: dict[str, Any], **guidance: Any
) -> dict[str, Run]:
    """The same run in each way, by name.

    Args:
        compiled: a compiled DiT of diffusers.
        latents: what the run begins with.
        scheduler: one that does not scale the model's input, with its timesteps set.
        conditioning: arguments of the model, for both halves of the batch if there is guidance.
        guidance: `guidance_scale` and `conditional_first` of `sample`, or nothing.
    """

    def sampled() -> torch.Tensor:
        found: torch.Tensor = compiled.sample(latents, scheduler, **guidance, **conditioning)
        return found

    def stepwise() -> torch.Tensor:
        with step_by_step():
            return sampled()

    scale, first = guidance.get("guidance_scale"), guidance.get("conditional_first", False)
    own, timesteps = copy.deepcopy(scheduler), scheduler.timesteps.tolist()  # a scheduler that is set anew in each run

    def loop() -> torch.Tensor:
        found = latents
        own.set_timesteps(len(timesteps))
        compiled.reset(timesteps)
        for t in own.timesteps.to(latents.device):
            given = found if scale is None else torch.cat([found, found])
            output = compiled(given, timestep=t.expand(len(given)), **conditioning).sample[:, : latents.shape[1]]
            if scale is not None:
                one, other = output.chunk(2)
                conditional, unconditional = (one, other) if first else (other, one)
                output = unconditional + scale * (conditional - unconditional)
            found = own.step(output, t, found, return_dict=False)[0]
        return found

    return {LOOP: loop, STEPS: stepwise, WHOLE: sampled}


@contextmanager
def step_by_step() -> Iterator[None]:
    """Within this block no run is recorded or replayed in one piece."""
    with mock.patch.object(whole_run_stream, "MAX_STEPS", 0):
        yield
