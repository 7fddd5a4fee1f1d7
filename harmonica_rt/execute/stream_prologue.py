"""Runs the prologue of one stream: for all steps in one batch if the timesteps are foreseen, else step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.execute.forecast import Forecast, Timesteps
from harmonica_rt.execute.lowered_prologue import LoweredPrologue, Values
from harmonica_rt.execute.parameter_binding import Bindable
from harmonica_rt.indices import StepIndex

Bind = Callable[[Bindable], tuple[Any, ...]]


@dataclass
class HoistedValues:
    """The hoisted values of the current request.

    Attributes:
        request: the values of the request by name, joined tensors included; None before its first step.
        joined: the parameters that those tensors were made of.
        given: those among them that the timestep part takes.
        steps: the values of all steps, `[steps, ...]` each; None where they are not known.
    """

    request: dict[str, torch.Tensor] | None = None
    joined: tuple[Any, ...] = ()
    given: Values = field(default_factory=list)
    steps: tuple[torch.Tensor, ...] | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them."""
        yield from (self.request or {}).values()
        yield from self.given
        yield from self.steps or ()


class StreamPrologue:
    """The hoisted values of one stream in one run.

    Args:
        lowered: the prologue.
        bind: returns the parameters and constants of a part, as the model holds them in this run.
        forecast: the timesteps that the stream is expected to be given.
    """

    def __init__(self, lowered: LoweredPrologue, bind: Bind, forecast: Forecast) -> None:
        self._lowered = lowered
        self._bind = bind
        self._forecast = forecast
        self._values = HoistedValues()

    def begin(self) -> None:
        """The next call belongs to another request."""
        self._values = HoistedValues()

    def at(self, step: StepIndex, call: Call) -> dict[str, torch.Tensor]:
        """The hoisted values in `step` by name."""
        lowered, leaves, values, forecast = self._lowered, call.leaves, self._values, self._forecast
        each = lowered.each.part
        if values.request is None:
            values.request = self._compute(leaves, forecast.usable_at(step) if each.results else None)
        self._join(values.request)
        if not each.results:
            return values.request
        timesteps = tuple(leaves[index] for index in lowered.prologue.timesteps)
        forecast.visit(step, timesteps)
        forecast.log.write(step, timesteps)
        if values.steps is not None and forecast.comparable and not forecast.agrees(step, timesteps):
            values.steps = None
        if values.steps is not None:
            forecast.trusted = not forecast.comparable
            rows = tuple(value[step] for value in values.steps)
        else:
            inputs = [leaves[index] for index in each.inputs]
            rows = lowered.each.run(*self._bind(lowered.each), *inputs, *values.given)
        return {**values.request, **dict(zip(each.results, rows, strict=True))}

    def end(self) -> None:
        """The run is over: learn its timesteps.

        Raises:
            RunError: the run was computed with other timesteps.
        """
        self._forecast.end()

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that this object keeps between calls."""
        yield from self._values.tensors()
        yield from self._forecast.tensors()

    def _join(self, request: dict[str, torch.Tensor]) -> None:
        """Add the joined tensors to the values of a request, unless they are there, made of the present parameters."""
        lowered, bound = self._lowered.joined, self._bind(self._lowered.joined)
        if bound is not self._values.joined:
            request.update({name: torch.cat(parts) for name, parts in lowered.by_name(bound).items()})
            self._values.joined = bound

    def _compute(self, leaves: Sequence[Any], foreseen: Timesteps | None) -> dict[str, torch.Tensor]:
        """Compute the values of a request, and those of all its steps where their timesteps are foreseen."""
        lowered, values = self._lowered, self._values
        request = lowered.of_request(self._bind(lowered.once), leaves)
        values.given = lowered.given(request)
        if foreseen is not None:
            values.steps = lowered.in_steps(foreseen, self._bind(lowered.each), leaves, values.given)
        return request
