"""Runs the prologue of one stream: for all steps in one batch if the timesteps are foreseen, else step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.execute.forecast import Forecast, Timesteps
from harmonica_rt.execute.lowered_prologue import LoweredPart, LoweredPrologue, Values
from harmonica_rt.execute.static_tensors import HoistedMemory
from harmonica_rt.indices import StepIndex


class PrologueGraphs(Protocol):
    """Runs a prologue as a graph."""

    def run_prologue(
        self,
        prologue: LoweredPrologue,
        leaves: Sequence[Any],
        foreseen: Sequence[torch.Tensor],
        body: Callable[[Sequence[Any], Sequence[torch.Tensor]], None],
    ) -> None:
        """Have `body` compute the values of all steps, or replay a recording of it."""


@dataclass
class HoistedValues:
    """The hoisted values of the current request, as far as they are computed.

    Attributes:
        once: the values of the request by name; None before its first step.
        given: those of them that the timestep part takes.
        all_known: whether the values of all steps are known.
        steps: those values, `[steps, ...]` each, unless a memory holds them.
    """

    once: dict[str, torch.Tensor] | None = None
    given: Values = field(default_factory=list)
    all_known: bool = False
    steps: tuple[torch.Tensor, ...] = ()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors here."""
        yield from (self.once or {}).values()
        yield from self.given
        yield from self.steps


class StreamPrologue:
    """The hoisted values of one stream in one run.

    Args:
        lowered: the prologue.
        bind: returns the parameters and constants of a part, as the model holds them in this run.
        forecast: the timesteps that the stream is expected to get.
        memory: where the values are stored for graphs to read; None passes on the values as computed.
        graphs: records the prologue itself too; None runs it launch by launch.
    """

    def __init__(
        self,
        lowered: LoweredPrologue,
        bind: Callable[[LoweredPart], tuple[Any, ...]],
        forecast: Forecast,
        *,
        memory: HoistedMemory | None = None,
        graphs: PrologueGraphs | None = None,
    ) -> None:
        self._lowered = lowered
        self._bind = bind
        self._forecast = forecast
        self._memory = memory
        self._graphs = graphs
        self._values = HoistedValues()

    def begin(self) -> None:
        """The next call belongs to another request."""
        self._values = HoistedValues()

    def at(self, step: StepIndex, call: Call) -> dict[str, torch.Tensor]:
        """The hoisted values in `step` by name."""
        lowered, leaves, values, forecast = self._lowered, call.leaves, self._values, self._forecast
        each = lowered.each.part
        if values.once is None:
            values.once = self._compute(leaves, forecast.usable_at(step) if each.results else None)
        if not each.results:
            return values.once if self._memory is None else self._memory.tensors
        timesteps = tuple(leaves[index] for index in lowered.prologue.timesteps)
        forecast.record(step, timesteps)
        if values.all_known and forecast.comparable and not forecast.agrees(step, timesteps):
            values.all_known, values.steps = False, ()
        if values.all_known:
            forecast.trusted = not forecast.comparable
            if self._memory is not None:
                return self._memory.select(step)
            rows = tuple(value[step] for value in values.steps)
        else:
            inputs = [leaves[index] for index in each.inputs]
            rows = lowered.each.run(*self._bind(lowered.each), *inputs, *values.given)
        found = dict(zip(each.results, rows, strict=True))
        return {**values.once, **found} if self._memory is None else self._memory.put(found)

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

    def _compute(self, leaves: Sequence[Any], foreseen: Timesteps | None) -> dict[str, torch.Tensor]:
        """Compute the values of a request, and those of all its steps where their timesteps are foreseen."""
        lowered, memory, values = self._lowered, self._memory, self._values
        once = self._bind(lowered.once)  # first: if parameters have moved, this drops the graphs
        if memory is not None and self._graphs is not None and foreseen is not None and lowered.batches:
            body = functools.partial(_fill, lowered, memory, once, self._bind(lowered.each))
            self._graphs.run_prologue(lowered, leaves, foreseen, body)
            values.all_known = lowered.batches
            values.given = [memory.tensors[name] for name in lowered.each.part.given]
            return memory.tensors
        of_request = lowered.of_request(once, leaves)
        values.given, steps = lowered.given(of_request), None
        if foreseen is not None:
            steps = lowered.in_steps(foreseen, self._bind(lowered.each), leaves, values.given)
        values.all_known = steps is not None
        if memory is not None:
            memory.begin(of_request, lowered.each.part.results, steps)
        elif steps is not None:
            values.steps = steps
        return of_request


def _fill(
    lowered: LoweredPrologue,
    memory: HoistedMemory,
    once: tuple[Any, ...],
    each: tuple[Any, ...],
    leaves: Sequence[Any],
    foreseen: Sequence[torch.Tensor],
) -> None:
    """The body of a prologue graph: compute all values of a run with these parameters and constants, into `memory`."""
    of_request = lowered.of_request(once, leaves)
    memory.begin(
        of_request, lowered.each.part.results, lowered.in_steps(foreseen, each, leaves, lowered.given(of_request))
    )
