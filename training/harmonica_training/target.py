"""Reaches a speed-up or a CUR: chooses beta, and the mask that meets the target.

A router's loss is `sum_t lambda_t mse_t + beta * sum w_i r[t, i]`, with the site's share of the cost as its weight w.
Which beta gives which speed-up depends on the model, the sampler and lambda, and is not known beforehand.

With soft gates, beta is the multiplier of the constraint "save this share of the cost" and is updated by dual ascent,
with damping because logits move slowly and the cost that they will lead to is known late; `land` meets the target once,
after the last iteration. With hard gates, `land` meets it in every iteration, and beta is the median price of reuse.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_rt.untrusted.text import quoted
from harmonica_training.config import TrainConfig
from harmonica_training.costs import SiteCosts
from harmonica_training.errors import CheckpointError, TrainingError
from harmonica_training.router import logit

GAIN = 5.0  # change of log beta per unit of learning rate and per unit of missing share
DAMPING = 4.0  # change of log beta per unit of change of the saved share
SOFTNESS = 0.5  # width, in logits, of the soft threshold by which the saved share is estimated
MEMORY = 0.3  # weight of the newest gradient in the prices
TINY = 1e-12  # smallest beta that is chosen, so that it can grow
LARGEST_BETA = 1e30  # largest that a checkpoint may hold: further growth still fits a float
TOLERANCE = 0.02  # relative difference between the target and what a schedule reaches


class Target:
    """Computes what a schedule saves, and finds the one that saves what the config asks for.

    Args:
        config: holds `target_speedup`, `target_cur`, or neither.
        costs: the costs of the sites.
        free: bool `[steps]`, the steps that may reuse.

    Raises:
        TrainingError: no schedule reaches the target.
    """

    def __init__(self, config: TrainConfig, costs: SiteCosts, free: NDArray[np.bool_]) -> None:
        self._by_cur = config.target_cur is not None
        self._costs = costs
        self._free = free
        self.value = config.target_cur if self._by_cur else config.target_speedup
        shares = np.ones(len(costs.sites)) if self._by_cur else costs.alone
        self.weights: NDArray[np.float64] = shares / shares.mean()  # weights of the sites in the penalty, mean 1
        most = self.reached(np.repeat(~free[:, None], len(costs.sites), axis=1))
        if self.value is not None and self.value > most:
            name = "target_cur" if self._by_cur else "target_speedup"
            raise TrainingError(
                f"{name}: {self.value:g} cannot be reached; with everything reused where it can be, it is {most:.4g}"
            )

    def reached(self, computes: NDArray[np.bool_]) -> float:
        """The speed-up of a mask, bool `[steps, sites]`, or its CUR if that is the target."""
        return 1.0 - float(computes.mean()) if self._by_cur else self._costs.speedup(computes)

    @property
    def goal(self) -> float | None:
        """The share of the cost to save, 0 ... 1; None without a target."""
        if self.value is None or self._by_cur:
            return self.value
        return 1.0 - 1.0 / self.value

    def saved(self, reuses: Tensor) -> float:
        """The share of the cost that `reuses`, `[steps, sites]` in 0 (compute) ... 1 (reuse), saves to first order."""
        weights = torch.from_numpy(self.weights).to(reuses)
        share = float((reuses * weights).mean())
        return share if self._by_cur else share * float(self._costs.alone.sum())

    def land(
        self, scores: NDArray[np.float64], prices: NDArray[np.float64], tau: float
    ) -> tuple[NDArray[np.bool_], float]:
        """Land on the target: the mask nearest to `scores > tau` that meets it, and the threshold that gives this mask.

        Entries are reused in the order of their scores; those of equal score (logits end at their limits) in the order
        of their prices. Without a target, or if tau meets it, the mask is `scores > tau`.

        Args:
            scores: r, `[steps, sites]`.
            prices: what reusing an entry costs the image, relative to what it saves, `[steps, sites]`.
            tau: the threshold to stay near.
        """
        at_tau = (scores > tau) | ~self._free[:, None]
        if self.value is None or abs(self.reached(at_tau) / self.value - 1) <= TOLERANCE / 4:
            return at_tau, tau
        entries = np.flatnonzero(np.repeat(self._free[:, None], scores.shape[1], axis=1))
        order = entries[np.lexsort((prices.flat[entries], scores.flat[entries]))]

        def mask(reused: int) -> NDArray[np.bool_]:
            computes = np.ones(scores.size, dtype=np.bool_)
            computes[order[:reused]] = False
            return computes.reshape(scores.shape)

        low, high = 0, len(order)
        while high - low > 1:  # the speed-up or CUR grows with the number of reused entries
            middle = (low + high) // 2
            low, high = (middle, high) if self.reached(mask(middle)) < self.value else (low, middle)
        value = self.value
        reused = min((low, high), key=lambda count: abs(self.reached(mask(count)) - value))
        around = scores.flat[order[max(reused - 1, 0) : reused + 1]]
        return mask(reused), float(around.mean())


class Steering:
    """Chooses beta iteration by iteration, and keeps the price of each entry: what reusing it costs the image.

    Args:
        target: what to reach.
        config: holds `beta`, which stays fixed if there is no target, and `tau`.
        shape: (steps, sites).
    """

    def __init__(self, target: Target, config: TrainConfig, shape: tuple[int, int]) -> None:
        self.target = target
        self._middle = logit(config.tau)
        self._soft = config.gates == "soft"
        self.beta = config.beta
        self._saved: float | None = None
        self.prices = torch.zeros(shape)

    def observe(
        self, by_score: Tensor, drawn: NDArray[np.bool_], free: NDArray[np.bool_], computes: NDArray[np.bool_]
    ) -> None:
        """Update the prices from gradients of the error, and choose beta: always with hard gates, else only at first.

        The first beta is the one at which entries that make up the goal's share favour reuse. With hard gates, only
        reused entries have a price, and beta is their median: the more expensive half is pulled back towards computing,
        which makes room for the entries nearest to being reused.

        Args:
            by_score: `[steps, sites]`, gradient of the error w.r.t. the scores; negative where computing helps.
            drawn: bool `[steps]`, the steps that the gradient covers.
            free: bool `[steps]`, the steps that may reuse.
            computes: bool `[steps, sites]`, r > tau.
        """
        seen = torch.from_numpy((drawn & free)[:, None] & (self._soft | ~computes))
        prices = (-by_score.cpu() / torch.from_numpy(self.target.weights)).float()[seen]
        old = self.prices[seen]
        self.prices[seen] = torch.where(old == 0, prices, torch.lerp(old, prices, MEMORY))
        goal = self.target.goal
        if goal is None or not len(prices):
            return
        if not self._soft:
            self.beta = max(float(self.prices[seen].median()), TINY)
        elif self.beta is None:
            share = min(1.0, goal * len(free) / int(free.sum()))
            self.beta = max(float(prices.clamp(min=0).quantile(share)), TINY)

    def follow(self, logits: Tensor, learning_rate: float, free: NDArray[np.bool_]) -> None:
        """After an optimiser step, correct beta towards the goal; with hard gates, do nothing."""
        goal = self.target.goal
        if goal is None or self.beta is None or not self._soft:
            return
        reuses = ((self._middle - logits) / SOFTNESS).sigmoid()
        reuses[torch.from_numpy(~free)] = 0.0
        saved = self.target.saved(reuses)
        change = 0.0 if self._saved is None else saved - self._saved
        self._saved = saved
        self.beta *= math.exp(GAIN * learning_rate * (goal - saved) - DAMPING * change)

    def penalty(self) -> Tensor:
        """The cost per unit of each site's score at every step, `[sites]`."""
        return torch.from_numpy(self.target.weights).float() * (self.beta or 0.0)

    def state(self) -> dict[str, float | None]:
        """The values that a checkpoint keeps in addition to `prices`."""
        return {"beta": self.beta, "saved": self._saved}

    def load(self, state: object, prices: Tensor) -> None:
        """Restore `state` and `prices` from a checkpoint.

        Raises:
            CheckpointError: `state` is not what `state()` returns.
        """
        match state:
            case {"beta": float() | int() | None as beta, "saved": float() | int() | None as saved, **rest} if (
                not rest and abs(beta or 0) < LARGEST_BETA and abs(saved or 0) <= 1
            ):
                self.beta, self._saved, self.prices = beta, saved, prices
            case _:
                raise CheckpointError(f"steering: expected beta and saved, numbers or null, got {quoted(state)}")
