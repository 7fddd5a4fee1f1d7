"""A linear sampler: what a run computes between the calls of its model.

A sampler is linear if the next latents x are a sum of earlier latents and model outputs m with weights that are known
before the run. With r the number of the step in the run:

    x[r + 1] = sum over j < depth of a[r, j] * x[r - j] + b[r, j] * m[r - j]

All of it is computed in fp32 (fp64 for fp64 latents), the latents between the steps included; only what the model is
given is rounded to the dtype of the latents that the run began with.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from harmonica_rt.call.call import Call
from harmonica_rt.errors import SamplerError
from harmonica_rt.indices import StepIndex


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The numbers of a linear sampler, for the steps of a run.

    Attributes:
        weights: float64 `[rows, depth, 2]`: `a[r, j]` and `b[r, j]`.
        scales: float64 `[rows]`: what latents are multiplied by before the model is given them.
    """

    weights: NDArray[np.float64]
    scales: NDArray[np.float64]

    @property
    def depth(self) -> int:
        """The number of steps whose latents and outputs the next latents depend on."""
        return int(self.weights.shape[1])


@dataclass(frozen=True, eq=False)
class Sampler:
    """A run with a linear sampler.

    Attributes:
        table: the numbers.
        latents: `[B, C, ...]`, what the run begins with.
        timesteps: what the model is given, one per row of the table.
        timestep_dtype: the dtype that it is given them in.
        guidance: the scale of classifier-free guidance, for which the model is called with the latents twice along the
            batch; None without.
        conditional_first: whether the first half of that batch is the conditional one.
        first: the step of the schedule that the run begins with.
        arguments: the names of the model's arguments for latents and timestep.
    """

    table: SamplerTable
    latents: torch.Tensor
    timesteps: tuple[float, ...]
    timestep_dtype: torch.dtype
    guidance: float | None
    conditional_first: bool
    first: StepIndex
    arguments: tuple[str, str]

    @property
    def batch(self) -> int:
        """The size of the model's batch."""
        return len(self.latents) * (1 if self.guidance is None else 2)

    @functools.cached_property
    def scales_input(self) -> bool:
        """Whether the model is given something else than the latents."""
        return bool((self.table.scales != 1).any())

    @property
    def kind(self) -> Hashable:
        """Equal for samplers whose runs make the same launches on memory of the same layout."""
        latents = self.latents
        layout = (latents.shape, latents.dtype, latents.device, self.table.weights.shape, self.first)
        return (*layout, self.timestep_dtype, self.guidance is None, self.conditional_first, self.scales_input)

    @functools.cached_property
    def rows(self) -> NDArray[np.float64]:
        """`[rows, 2 * depth + 2]`: weights, in the order of a `SamplerState`'s history; input scale; guidance."""
        weights, depth = self.table.weights, self.table.depth
        places = (np.arange(len(weights))[:, None] - np.arange(depth)) % depth
        ordered = np.empty_like(weights)
        np.put_along_axis(ordered, places[:, :, None], weights, axis=1)
        guidance = np.full((len(weights), 1), self.guidance or 0.0)
        return np.concatenate([ordered.reshape(len(weights), -1), self.table.scales[:, None], guidance], axis=1)

    def first_input(self) -> torch.Tensor:
        """What the model is given in the first step."""
        latents = self.latents
        if self.scales_input:
            latents = (latents.to(state_dtype(latents)) * float(self.table.scales[0])).to(latents.dtype)
        return latents if self.guidance is None else torch.cat([latents, latents])

    def first_timestep(self) -> torch.Tensor:
        """`[B]`, the timestep of the first step, expanded as pipelines do."""
        value, device = self.timesteps[0], self.latents.device
        # a launch: a copy from the host would wait for the device
        return torch.full((1,), value, dtype=self.timestep_dtype, device=device).expand(self.batch)


@dataclass(frozen=True, eq=False)
class WholeRun:
    """The result of all steps of a run: the latents after the last one."""

    latents: torch.Tensor


@runtime_checkable
class RunsWhole(Protocol):
    """A stream that may run all steps of a run at once."""

    def run_whole(self, call: Call, sampler: Sampler, *, catch_up: bool) -> torch.Tensor | None:
        """The latents after the last step; None if the steps have to be run one by one, of which none was.

        Args:
            call: the call of the first step.
            sampler: what lies between the steps.
            catch_up: see `Stream.run`; for the first step.
        """


def prediction_of(output: Any) -> torch.Tensor:
    """The tensor among what a model returned that a sampler takes: the first.

    Raises:
        SamplerError: there is none.
    """
    found = output
    while isinstance(found, tuple | list | dict) and found:
        found = next(iter(found.values() if isinstance(found, dict) else found))
    if not isinstance(found, torch.Tensor):
        raise SamplerError(
            f"sample() takes the first tensor that the model returns; it returned {type(output).__name__}"
        )
    return found


def state_dtype(latents: torch.Tensor) -> torch.dtype:
    """The dtype in which a sampler computes, for a run that begins with these latents."""
    return torch.promote_types(latents.dtype, torch.float32)
