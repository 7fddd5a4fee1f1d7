"""The number of the current step, in a device's memory."""

from __future__ import annotations

import torch

from harmonica_rt.indices import StepIndex


class StepCounter:
    """The number of the current step, in a device's memory.

    A graph replays the same launches whatever the step, so it finds the rows of its step by this number. The last
    launch of a step adds one to it. The host therefore writes it only where a run does not go on step by step.

    Attributes:
        tensor: int64 `[1]`.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.tensor = torch.zeros(1, dtype=torch.int64, device=device)
        self._expected: int | None = None  # its value once everything launched is done; None if that is not known

    @property
    def device(self) -> torch.device:
        """The device whose memory it lies in."""
        return self.tensor.device

    def begin(self, step: StepIndex) -> None:
        """Before the launches of `step`."""
        known, self._expected = self._expected, None
        if known != step:
            self.set(step)

    def set(self, step: StepIndex) -> None:
        """Write `step`."""
        self.tensor.fill_(step)

    def advance(self) -> None:
        """The last launch of a step: add one."""
        self.tensor.add_(1)

    def end(self, step: StepIndex) -> None:
        """After the launches of `step`, `advance` included."""
        self._expected = step + 1
