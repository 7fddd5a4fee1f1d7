"""Detects a run that begins without `reset()` or `set_timesteps`: its timesteps go back towards their beginning."""

from __future__ import annotations

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.errors import RunError
from harmonica_rt.indices import StepIndex


class TimestepOrder:
    """The order of a run's timesteps: it moves one way, so a run whose timesteps move backwards has restarted.

    A run that restarts moves back by at least its largest move; a sampler may move back by less (the timesteps of
    ancestral KDPM2 do, by rounding). Only timesteps on the CPU count: fetching one from a GPU would wait for it.
    """

    def __init__(self) -> None:
        self.moves = 0  # steps whose timestep differed from the previous one
        self._last: float | None = None
        self._largest_move = 0.0
        self._step = -1

    def check(self, call: Call, step: StepIndex) -> None:
        """Raise RunError if the timestep moves against the run's order, by at least its largest move so far."""
        value = _timestep(call)
        if value is None or step == self._step:
            return
        if self._last is not None and value != self._last:
            move = value - self._last
            if move * self._largest_move < 0 and abs(move) >= abs(self._largest_move):
                raise RunError(
                    f"step {step} came with timestep {value:g} after {self._last:g}, against the order of this run: a "
                    "new run seems to have begun. Call reset() before each run; in a pipeline, set_timesteps does so"
                )
            self.moves += 1
            if abs(move) > abs(self._largest_move):
                self._largest_move = move
        self._last, self._step = value, step


def _timestep(call: Call) -> float | None:
    for name in ("timestep", "timesteps", "t", "sigma"):
        value = call.kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel():
            return float(value.flatten()[0])
    return None
