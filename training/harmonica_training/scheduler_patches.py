"""Patches on a copy of a scheduler: repeatable noise, a window of its steps, given latents to start from."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from harmonica_training.errors import TrainingError


def give_generators(scheduler: Any, generators: list[torch.Generator]) -> None:
    """Let a scheduler that adds noise draw it from `generators` if the pipeline passes none (DiT's does not).

    Runs must be repeatable, and a sample's noise must not depend on the other samples in its batch.
    """
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        return

    @functools.wraps(step)
    def repeatable(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None:  # guidance may have doubled the batch
            kwargs["generator"] = generators * max(1, len(sample) // len(generators))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = repeatable


def limit(scheduler: Any, first: int, last: int) -> None:
    """Make `set_timesteps` set only the timesteps of the steps `first <= step < last`."""
    set_timesteps = scheduler.set_timesteps
    set_begin_index = getattr(scheduler, "set_begin_index", None)

    @functools.wraps(set_timesteps)
    def limited(*args: Any, **kwargs: Any) -> Any:
        set_timesteps(*args, **kwargs)
        if not 0 <= first < last <= len(scheduler.timesteps):
            raise TrainingError(f"a run of {len(scheduler.timesteps)} steps has no steps {first} to {last - 1}")
        scheduler.timesteps = scheduler.timesteps[first:last]
        if set_begin_index is not None:
            set_begin_index(first)

    scheduler.set_timesteps = limited
    if set_begin_index is not None:  # pipelines that call it begin at what is now the first step
        scheduler.set_begin_index = lambda index=0: set_begin_index(first + index)


def start_from(scheduler: Any, start: Tensor) -> None:
    """Replace the latents that the pipeline drew by `start`, at the first scaling and the first step."""
    scale, step = scheduler.scale_model_input, scheduler.step
    begun = False

    def begin(sample: Tensor) -> Tensor:  # guidance may have doubled the batch
        return start.to(sample).repeat(len(sample) // len(start), *[1] * (start.ndim - 1))

    def scaled(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return scale(sample if begun else begin(sample), *args, **kwargs)

    @functools.wraps(step)
    def stepped(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        if not begun:
            begun, sample = True, begin(sample)
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.scale_model_input, scheduler.step = scaled, stepped
