"""The router: how much of each site to compute at each step, `r = sigmoid(logits)`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harmonica_rt.schedule import Schedule
from harmonica_training.errors import TrainingError

LIMIT = 5.0  # logits stay in [-LIMIT, LIMIT] (released code): beyond, the sigmoid has no useful gradient
WARM = 2.0  # distance of the logits from the logit of tau when a training starts from a mask


class Router(nn.Module):
    """Learned logits `[steps, sites]`.

    Args:
        steps: number of steps (NFE).
        sites: names of the sites.
        initial: mean of the initial logits.
        spread: standard deviation of the initial logits. Neighbouring steps must not start alike: they would all be
            dropped, or kept, together, although one computed step lets the next one reuse.
        coherence: how much the sites of a step move together, 0 ... 1.
        seed: seed of the random logits.
        free: bool `[steps]`, the steps that may reuse; others always compute. By default all but the first.
    """

    def __init__(
        self,
        steps: int,
        sites: Sequence[str],
        *,
        initial: float = 0.0,
        spread: float = 1.0,
        coherence: float = 0.0,
        seed: int = 0,
        free: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__()
        self.free = np.arange(steps) > 0 if free is None else free
        self.sites = tuple(sites)
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(steps, len(self.sites), generator=generator)
        shared = torch.randn(steps, 1, generator=generator)
        self._coherence = coherence
        self._noise = spread * (coherence**0.5 * shared + (1 - coherence) ** 0.5 * own)
        # one parameter per step: an optimiser skips a step that has no gradient
        self.rows = nn.ParameterList(list((initial + self._noise).clamp(-LIMIT, LIMIT)))

    @property
    def logits(self) -> Tensor:
        """A copy of the logits, `[steps, sites]`."""
        return torch.stack([row.detach() for row in self.rows])

    def scores(self) -> Tensor:
        """The scores `r`, `[steps, sites]` in 0 ... 1; exactly 1 at steps that always compute. Without gradients."""
        scores = self.logits.sigmoid()
        scores[torch.from_numpy(~self.free)] = 1.0
        return scores

    def computes(self, tau: float) -> NDArray[np.bool_]:
        """The mask `r > tau`, bool `[steps, sites]`: the schedule that the router stands for."""
        mask: NDArray[np.bool_] = (self.scores() > tau).cpu().numpy()
        return mask

    def set_gradient(self, by_score: Tensor, steps: NDArray[np.bool_]) -> None:
        """Set the gradients of the logits of `steps` from `d loss / d r`, `[steps, sites]`; other steps have none."""
        scores = self.scores()
        by_logit = by_score * scores * (1 - scores)
        by_logit = torch.lerp(by_logit, by_logit.mean(dim=1, keepdim=True), self._coherence)
        for row, gradient, chosen, free in zip(self.rows, by_logit, steps, self.free, strict=True):
            row.grad = gradient.to(row.dtype).clone() if chosen and free else None

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the logits to the range where their sigmoid has a gradient."""
        for row in self.rows:
            row.clamp_(-LIMIT, LIMIT)

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Shift all logits equally: the order of the entries stays the same, only the threshold moves."""
        if by:
            for row in self.rows:
                row.add_(by)
            self.clamp()

    @torch.no_grad()
    def load(self, logits: Tensor) -> None:
        """Load logits `[steps, sites]`."""
        for row, values in zip(self.rows, logits, strict=True):
            row.copy_(values)

    def start_from(self, schedule: Schedule, tau: float) -> None:
        """Warm start from the scores that made `schedule`, or else from its mask, spread on either side of `tau`.

        Raises:
            TrainingError: the schedule has other sites or another number of steps.
        """
        if schedule.sites != self.sites or schedule.steps != len(self.rows):
            raise TrainingError(
                f"the schedule to start from has {schedule.steps} steps and {len(schedule.sites)} sites; this "
                f"training has {len(self.rows)} steps and the {len(self.sites)} sites {self.sites[0]} ... "
                f"{self.sites[-1]}"
            )
        mask = torch.from_numpy(np.array(schedule.compute))
        logits = logit(tau) + torch.where(mask, WARM, -WARM) + self._noise
        scores = schedule.made_by.scores if schedule.made_by else None
        for step, row in enumerate(scores or ()):
            if row is not None:
                logits[step] = torch.tensor(row)
        self.load(logits.clamp(-LIMIT, LIMIT))


def logit(score: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(score / (1 - score))
