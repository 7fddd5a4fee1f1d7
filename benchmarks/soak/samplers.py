"""The schedulers of diffusers that worlds use, by name, and how many steps a run has with each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import diffusers as d

_BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SAMPLERS: Mapping[str, Callable[[], Any]] = {
    "DDIM": functools.partial(d.DDIMScheduler, **_BETAS),
    "Euler": functools.partial(d.EulerDiscreteScheduler, **_BETAS),
    "Euler ancestral": functools.partial(d.EulerAncestralDiscreteScheduler, **_BETAS),
    "DPM++": functools.partial(d.DPMSolverMultistepScheduler, **_BETAS),
    "UniPC": functools.partial(d.UniPCMultistepScheduler, **_BETAS),
    "Heun": functools.partial(d.HeunDiscreteScheduler, **_BETAS),
    "KDPM2": functools.partial(d.KDPM2DiscreteScheduler, **_BETAS),
    "KDPM2 ancestral": functools.partial(d.KDPM2AncestralDiscreteScheduler, **_BETAS),
    "PNDM": functools.partial(d.PNDMScheduler, skip_prk_steps=True, **_BETAS),
    "flow": d.FlowMatchEulerDiscreteScheduler,
    "flow Heun": d.FlowMatchHeunDiscreteScheduler,
    "flow, shifted": functools.partial(d.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
}
NOISE_SAMPLERS = tuple(name for name in SAMPLERS if not name.startswith("flow"))
# A run may start at a later step: one evaluation per step, and the scheduler has set_begin_index.
LATE_SAMPLERS = ("Euler", "Euler ancestral", "DPM++", "UniPC", "flow")


@functools.cache
def evaluations(sampler: str, inference_steps: int) -> int:
    """Number of steps of a run, as the sampler counts them."""
    scheduler = SAMPLERS[sampler]()
    scheduler.set_timesteps(inference_steps, **({"mu": 1.0} if sampler == "flow, shifted" else {}))
    return len(scheduler.timesteps)
