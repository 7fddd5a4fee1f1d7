"""Run the prologue: hoisted values of a stream, for all steps in one batched pass where the timesteps are foreseen.

What timesteps a model is given is known only when it is called: pipelines scale, shift and round those of their
scheduler. So those of the last run are taken as a forecast for this one, and each step compares. Where the forecast is
missing or wrong, the step computes its own values; the next run knows better.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from harmonica_rt.capture.call import Call
from harmonica_rt.indices import StepIndex
from harmonica_rt.passes.hoist import Part, Prologue

log = logging.getLogger(__name__)

Timesteps = tuple[torch.Tensor, ...]
Values = list[torch.Tensor]


class LoweredPart:
    """A part of the prologue, ready to run."""

    def __init__(self, part: Part, root: nn.Module) -> None:
        self.part = part
        self.run: Callable[..., tuple[torch.Tensor, ...]] = fx.GraphModule(root, part.graph, "Prologue").forward

    def bind(self, weights: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """The weights and constants that it takes."""
        part = self.part
        return (*(weights[name] for name in part.weights), *(constants[name] for name in part.constants))


class LoweredPrologue:
    """A prologue and what is known of the timesteps of its runs.

    Args:
        prologue: what to hoist.
        root: module that `get_attr` nodes refer to.
        steps: of a run.
    """

    def __init__(self, prologue: Prologue, root: nn.Module, steps: int) -> None:
        self.prologue = prologue
        self.once = LoweredPart(prologue.once, root)
        self.each = LoweredPart(prologue.each, root)
        self.forecast: list[Timesteps | None] = [None] * steps
        self.batches = True

    def in_steps(self, bound: tuple[Any, ...], leaves: Sequence[Any], given: Values) -> list[Values] | None:
        """The values of every step of the forecast; None where it has gaps, or the graph cannot be batched."""
        part, timesteps = self.each.part, self.prologue.timesteps
        foreseen = [known for known in self.forecast if known is not None]
        if not self.batches or len(foreseen) < len(self.forecast):
            return None
        stacked = dict(zip(timesteps, map(torch.stack, zip(*foreseen, strict=True)), strict=True))
        inputs = [stacked.get(index, leaves[index]) for index in part.inputs]
        dims = (
            *(None for _ in bound),
            *(0 if index in stacked else None for index in part.inputs),
            *(None for _ in given),
        )
        try:
            values = torch.vmap(self.each.run, in_dims=dims)(*bound, *inputs, *given)
        except (RuntimeError, NotImplementedError) as error:  # an operator without a batching rule
            log.info("timestep-only values are computed step by step: %s", str(error).partition("\n")[0])
            self.batches = False
            return None
        return [list(step) for step in zip(*(value.unbind(0) for value in values), strict=True)]


class StreamPrologue:
    """The hoisted values of one stream.

    Args:
        lowered: the prologue.
        bind: gives the weights and constants of a part, as the model holds them in this run.
    """

    def __init__(self, lowered: LoweredPrologue, bind: Callable[[LoweredPart], tuple[Any, ...]]) -> None:
        self._lowered = lowered
        self._bind = bind
        self.begin()

    def begin(self) -> None:
        """The next call is of another request."""
        self._once: dict[str, torch.Tensor] | None = None
        self._given: Values = []
        self._steps: list[Values] | None = None

    def at(self, step: StepIndex, call: Call) -> dict[str, torch.Tensor]:
        """The hoisted values in `step` by name."""
        lowered, leaves = self._lowered, call.leaves
        each = lowered.each.part
        if self._once is None:
            self._once = self._run_once(leaves)
            self._given = [self._once[name] for name in each.given]
            if each.results:
                self._steps = lowered.in_steps(self._bind(lowered.each), leaves, self._given)
        if not each.results:
            return self._once
        timesteps = tuple(leaves[index] for index in lowered.prologue.timesteps)
        if not _equal(lowered.forecast[step], timesteps):
            lowered.forecast[step] = tuple(_copy(timestep) for timestep in timesteps)
            self._steps = None
        if self._steps is not None:
            values = self._steps[step]
        else:
            inputs = [leaves[index] for index in each.inputs]
            values = list(lowered.each.run(*self._bind(lowered.each), *inputs, *self._given))
        return {**self._once, **dict(zip(each.results, values, strict=True))}

    def _run_once(self, leaves: Sequence[Any]) -> dict[str, torch.Tensor]:
        once = self._lowered.once
        inputs = [leaves[index] for index in once.part.inputs]
        return dict(zip(once.part.results, once.run(*self._bind(once), *inputs), strict=True))


def _equal(known: Timesteps | None, timesteps: Timesteps) -> bool:
    return known is not None and all(torch.equal(a, b) for a, b in zip(known, timesteps, strict=True))


def _copy(timestep: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty_like(timestep).copy_(timestep)
