"""The outcome of a run: what it gave, or the error that it raised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.soak.oracle import Counts


@dataclass
class Outcome:
    """What a run gave on one side.

    Attributes:
        latents: the latents after each step.
        result: last latents or images; None if the run was interrupted.
        outside: outputs and gradients of calls from outside the run.
        interrupted: True if a callback raised.
        counts: calls and reused entries; None if unknown.
        fallbacks: why calls ran eagerly.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    result: torch.Tensor | None = None
    outside: list[torch.Tensor] = field(default_factory=list)
    interrupted: bool = False
    counts: Counts | None = None
    fallbacks: tuple[str, ...] = ()


def given_or_raised(sample: Callable[[], Outcome]) -> Callable[[], Outcome]:
    """Call `sample` now; the returned function returns its outcome or raises its error."""
    try:
        outcome = sample()
    except BaseException as error:
        return functools.partial(_raise, error)
    return lambda: outcome


def _raise(error: BaseException) -> Outcome:
    raise error
