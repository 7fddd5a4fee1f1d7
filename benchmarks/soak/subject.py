"""A kind of pipeline to soak: how to build it, run it, call its denoiser and change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.soak.change import Change
from benchmarks.soak.world import Request

PROMPT_FACTORS = (1.0, -0.7, 0.4)  # prompt i is the subject's own prompt times factor i


class Controls:
    """What a callback may do to the run in progress.

    Each subject implements the controls that its `events` name; the others are never used.
    """

    def prompt(self, value: int, *, in_place: bool) -> None:
        """Continue with prompt `value`, written into the current prompt's memory or held in a new tensor."""
        raise NotImplementedError

    def guidance_off(self) -> None:
        """Continue without guidance."""
        raise NotImplementedError

    def stop(self) -> None:
        """Make this step the last one."""
        raise NotImplementedError


OnStepEnd = Callable[[int, torch.Tensor, Controls], None]
"""(step, latents, controls); called after each step."""


@dataclass(frozen=True)
class Subject:
    """A kind of pipeline.

    Attributes:
        build: builds a pipeline from the world's seed, variant and sampler.
        sample: runs it for a request and a number of inference steps; returns the last latents or the images.
        arguments: keyword arguments of one call of its denoiser, drawn from a seed.
        changes: the changes that can be made to it, by name.
        samplers: names of the schedulers that fit it.
        guidance: True if it has guidance.
        events: kinds of events that it supports besides changes.
        late: samplers with which a run may start at a later step.
        before: what may happen right before a run, and its probability.
    """

    build: Callable[[int, int, str], Any]
    sample: Callable[[Any, Request, int, OnStepEnd], torch.Tensor]
    arguments: Callable[[Any, int], dict[str, Any]]
    changes: Mapping[str, Change]
    samplers: tuple[str, ...]
    guidance: bool = True
    events: tuple[str, ...] = ("raise", "outside", "gradient", "collect")
    late: tuple[str, ...] = ()
    before: Mapping[str, float] = field(
        default_factory=lambda: {
            "save and load": 0.03,
            "compile again": 0.03,
            "another scheduler": 0.05,
            "collect": 0.02,
            "outside": 0.05,
            "gradient": 0.08,
        }
    )

    def starts_late(self, sampler: str) -> bool:
        """True if a run with this sampler may start at a later step."""
        return sampler in self.late
