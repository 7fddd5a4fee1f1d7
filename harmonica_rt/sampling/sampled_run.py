"""What `sample` is asked for: checked, and made into a sampler and the arguments of the model's calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harmonica_rt.call.call import CallConvention
from harmonica_rt.call.roles import sampled_arguments
from harmonica_rt.engine import RunKey
from harmonica_rt.errors import ArgumentError
from harmonica_rt.execute.sampler import Sampler, WholeRun, prediction_of
from harmonica_rt.execute.sampler_state import SamplerState
from harmonica_rt.options import check_flags, check_whole_number
from harmonica_rt.sampling.gradients import check_no_gradient
from harmonica_rt.sampling.known_samplers import KnownSamplers
from harmonica_rt.untrusted.text import described

ModelTimestep = Callable[[torch.Tensor], torch.Tensor]
StepCall = Callable[[dict[str, Any], Sampler | None], object]  # arguments of the model -> its output, or a `WholeRun`


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How to sample; see `Denoiser.sample`.

    Raises:
        ArgumentError: an option is not what it takes.
    """

    guidance_scale: float | None = None
    conditional_first: bool = False
    model_timestep: ModelTimestep | None = None
    begin_index: int | None = None

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if scale is not None and not is_number:
            raise ArgumentError(f"guidance_scale must be a finite number or None, got {described(scale)}")
        check_flags(conditional_first=self.conditional_first)
        if self.model_timestep is not None and not callable(self.model_timestep):
            raise ArgumentError(
                "model_timestep is a function of the scheduler's timesteps, such as lambda t: t / 1000; got "
                f"{described(self.model_timestep)}"
            )
        if self.begin_index is not None:
            check_whole_number("begin_index", self.begin_index, least=0)


@dataclass(frozen=True, eq=False)
class SampledRun:
    """A run that `sample` makes.

    Attributes:
        sampler: what lies between the steps.
        conditioning: the arguments of the model besides latents and timestep.
        key: the key of the run.
    """

    sampler: Sampler
    conditioning: dict[str, Any]
    key: RunKey | None

    def run(self, call: StepCall) -> torch.Tensor:
        """Call the model for all steps; return the latents after the last one."""
        sampler = self.sampler
        output = call(self._arguments(sampler.first_input(), sampler.first_timestep()), sampler)
        if isinstance(output, WholeRun):
            return output.latents
        state = SamplerState(sampler)
        state.load(sampler)
        state.advance(0, prediction_of(output))
        for row in range(1, len(sampler.rows)):
            output = call(self._arguments(state.model_input(row), state.timestep(row)), None)
            state.advance(row, prediction_of(output))
        return state.result()

    def _arguments(self, latents: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        return {**dict(zip(self.sampler.arguments, (latents, timestep), strict=True)), **self.conditioning}


def sampled_run(
    latents: object,
    known: KnownSamplers,
    scheduler: Any,
    options: SampleOptions,
    conditioning: Mapping[str, Any],
    convention: CallConvention,
) -> SampledRun:
    """The run that `Denoiser.sample` is asked for.

    Raises:
        ArgumentError, RunError, SamplerError, ScheduleMismatchError: see there.
    """
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point() or latents.dim() < 2:
        raise ArgumentError(f"latents must be a tensor of floating-point numbers [B, C, ...], got {described(latents)}")
    check_no_gradient([("latents", latents), *conditioning.items()])
    names = _arguments_of_model(convention, conditioning)
    run = known.of(scheduler, options.begin_index)
    timesteps, values = run.timesteps, run.values
    if options.model_timestep is not None:
        timesteps = _model_timesteps(timesteps, options.model_timestep)
        values = tuple(timesteps.tolist())
    sampler = Sampler(
        table=run.table,
        latents=latents.contiguous(),  # as in all later steps, or the first would have a signature of its own
        timesteps=values,
        timestep_dtype=timesteps.dtype,
        guidance=None if options.guidance_scale is None else float(options.guidance_scale),
        conditional_first=options.conditional_first,
        first=run.first,
        arguments=names,
    )
    return SampledRun(sampler, dict(conditioning), run.key)


def _arguments_of_model(convention: CallConvention, conditioning: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the model's arguments for latents and timestep.

    Raises:
        ArgumentError: it lacks one of them, or the caller passes one as conditioning.
    """
    latents, timestep = sampled_arguments(convention.arguments)
    if latents is None or timestep is None:
        raise ArgumentError(
            f"sample() needs a model that takes latents and a timestep, not {', '.join(convention.arguments)}"
        )
    given = [name for name in (latents, timestep) if name in conditioning]
    if given:
        raise ArgumentError(
            f"sample() passes {given[0]} to the model itself; the latents to begin with come first, the scheduler "
            "second. To pass other timesteps than the scheduler's, give model_timestep"
        )
    return latents, timestep


def _model_timesteps(timesteps: torch.Tensor, change: ModelTimestep) -> torch.Tensor:
    """What the model is given for these timesteps, on the CPU."""
    changed = change(timesteps.clone())
    if not isinstance(changed, torch.Tensor) or changed.shape != timesteps.shape:
        raise ArgumentError(
            f"model_timestep must return one number per timestep, a tensor {list(timesteps.shape)}; it returned "
            f"{described(changed)}"
        )
    return changed.cpu()
