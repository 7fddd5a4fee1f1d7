"""The learning-rate curve of all stages, and the averaged parameters of the denoiser."""

import math

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps (at most 200), then a cosine to zero."""
    warmup = max(1, min(200, steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class AveragedParameters:
    """Exponential moving average of a module's parameters; the first 9 / (1 - decay) updates or so use a lower decay.

    Args:
        model: the module whose parameters are followed.
        decay: share of the old average that is kept at each update, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.names = [name for name, _ in model.named_parameters()]
        self.averages = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the parameters of `model`, which must be the module followed."""
        self.updates += 1
        decay = min(self.decay, (1.0 + self.updates) / (10.0 + self.updates))
        for average, parameter in zip(self.averages, model.parameters(), strict=True):
            average.lerp_(parameter, 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the names of the parameters."""
        return dict(zip(self.names, self.averages, strict=True))

    def restore(self, averages: dict[str, Tensor], updates: int) -> None:
        """Restore a saved state; raises KeyError if a parameter is missing."""
        self.averages = [averages[name] for name in self.names]
        self.updates = updates
