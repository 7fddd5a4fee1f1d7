"""Identifies a step by the timestep that the model receives in it.

Pipelines scale and reverse the scheduler's timesteps in a few ways, all of which are tried on the first call. If none
fits, or if the timestep is in half precision, the step stays unknown. A timestep on a GPU that is not an element of the
scheduler's own tensor is taken for that of the current step, because reading it would wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harmonica_rt.indices import StepIndex
from harmonica_rt.sampling.run_timesteps import RunTimesteps

COARSE = 1e-4  # eps of half precision is larger: it rounds a timestep to that of another step


@dataclass(frozen=True)
class _Scale:
    """The model receives `offset + factor * t` for a scheduler's timestep `t`."""

    offset: float
    factor: float

    def index(self, value: float, known: list[float], eps: float) -> int | None:
        """The index of the one timestep that `value` stands for; None if there is none, or several."""
        found = [i for i, t in enumerate(known) if self.fits(value, t, eps)]
        return found[0] if len(found) == 1 else None

    def fits(self, value: float, t: float, eps: float) -> bool:
        """Whether `value` stands for `t`, up to the rounding of the larger of its two summands."""
        return abs(self.offset + self.factor * t - value) <= eps * max(abs(self.offset), abs(self.factor * t))


class StepsByTimestep:
    """Identifies steps by the timesteps that the model receives."""

    def __init__(self, timesteps: RunTimesteps, training_steps: float) -> None:
        n = training_steps
        self._timesteps = timesteps
        self._known: list[float] = timesteps.known.tolist()
        self._first = True  # the first call shows which scales are possible
        # As in DiT; in Flux and relatives of SD3; in Mochi; in Lumina2 and Z-Image.
        self._scales = [_Scale(0, 1), _Scale(0, 1 / n), _Scale(n, -1), _Scale(1, -1 / n)]

    def step_of(self, timestep: torch.Tensor | None, step: StepIndex) -> int | None:
        """The step to which the timestep of a call in `step` belongs; None if that cannot be determined."""
        if timestep is None or step >= len(self._known):
            return None
        if timestep.device.type != "cpu":
            index = self._timesteps.position(timestep)
            return step if index is None or self._known[index] == self._known[step] else index
        value = _single_value(timestep)
        if value is None:
            return None
        # Two roundings of half a unit each: of the timestep, and of the value computed from it.
        eps = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
        if eps > COARSE:
            return None
        here = [scale for scale in self._scales if scale.fits(value, self._known[step], eps)]
        first, self._first = self._first, False
        if here or first:
            self._scales = here
        if here:
            return step
        found = {scale.index(value, self._known, eps) for scale in self._scales}
        return found.pop() if len(found) == 1 else None


def _single_value(timestep: torch.Tensor) -> float | None:
    """The common value of all elements; None if they differ, as when each frame has its own timestep."""
    first = timestep.flatten()[0]
    return float(first) if bool((timestep == first).all()) else None
