"""Run the prologue: the hoisted values of a stream, in one batched pass over all steps if the timesteps are foreseen.

The timesteps that a model is given are known only when it is called: pipelines scale, shift and round those of their
scheduler. So every run records the timesteps it is given, as the forecast for later runs with the same scheduler
timesteps. Without a forecast, each step computes its own values. Where a comparison is free (on a CPU), each step
compares, and computes its own values if the forecast was wrong. Elsewhere, reading a value would make the host wait for
the device, so a stream that begins with the run uses its forecast unseen and compares when it ends, where a difference
is an error; any other stream computes its own values.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx, nn

from harmonica_rt.call.call import Call
from harmonica_rt.engine import RunKey
from harmonica_rt.errors import RunError
from harmonica_rt.execute.static_tensors import HoistedMemory
from harmonica_rt.indices import StepIndex
from harmonica_rt.lower.hoist import Part, Prologue

log = logging.getLogger(__name__)

MAX_FORECASTS = 16  # kept; the least recently learned one is dropped first

Timesteps = tuple[torch.Tensor, ...]  # one for each timestep argument
Values = list[torch.Tensor]


class ForecastKey(NamedTuple):
    """What a forecast is kept under; streams with equal keys share it.

    Attributes:
        run: key of the run; None where no scheduler drives it.
        order: index of the stream among those of its plan: a model may be called twice per step with other timesteps.
    """

    run: RunKey | None
    order: int


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
        steps: number of steps of a run.
    """

    def __init__(self, prologue: Prologue, root: nn.Module, steps: int) -> None:
        self.prologue = prologue
        self.once = LoweredPart(prologue.once, root)
        self.each = LoweredPart(prologue.each, root)
        self.steps = steps
        self.batches = True  # until an operator turns out to have no batching rule
        self._has_batched = False
        self._forecasts: OrderedDict[ForecastKey, Timesteps] = OrderedDict()

    def forecast(self, key: ForecastKey) -> Timesteps | None:
        """The model's timesteps in a stream with this key, `[steps, ...]` each; None where not known."""
        return self._forecasts.get(key)

    def forget(self, key: ForecastKey) -> None:
        """Drop a forecast that was wrong."""
        self._forecasts.pop(key, None)

    def learn(self, key: ForecastKey, timesteps: Timesteps) -> None:
        """Keep the timesteps of a stream as the forecast for the next."""
        self._forecasts[key] = timesteps
        self._forecasts.move_to_end(key)
        while len(self._forecasts) > MAX_FORECASTS:
            self._forecasts.popitem(last=False)

    def of_request(self, bound: tuple[Any, ...], leaves: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The values of a request by name."""
        inputs = [leaves[index] for index in self.once.part.inputs]
        return dict(zip(self.once.part.results, self.once.run(*bound, *inputs), strict=True))

    def given(self, of_request: Mapping[str, torch.Tensor]) -> Values:
        """Those values of a request that the timestep part takes."""
        return [of_request[name] for name in self.each.part.given]

    def in_steps(
        self, foreseen: Sequence[torch.Tensor], bound: tuple[Any, ...], leaves: Sequence[Any], given: Values
    ) -> tuple[torch.Tensor, ...] | None:
        """The values of every step of a forecast, `[steps, ...]` each; None where the graph cannot be batched."""
        if not self.batches:
            return None
        part = self.each.part
        stacked = dict(zip(self.prologue.timesteps, foreseen, strict=True))
        inputs = [stacked.get(index, leaves[index]) for index in part.inputs]
        dims = (
            *(None for _ in bound),
            *(0 if index in stacked else None for index in part.inputs),
            *(None for _ in given),
        )
        try:
            values = tuple(torch.vmap(self.each.run, in_dims=dims)(*bound, *inputs, *given))
        except (RuntimeError, NotImplementedError) as error:  # as an operator without a batching rule raises
            if self._has_batched or isinstance(error, torch.OutOfMemoryError):
                raise
            log.info("timestep-only values are computed step by step: %s", str(error).partition("\n")[0])
            self.batches = False
            return None
        self._has_batched = True
        return values


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


class StreamPrologue:
    """The hoisted values of one stream in one run.

    Args:
        lowered: the prologue.
        bind: returns the weights and constants of a part, as the model holds them in this run.
        key: key of its forecast.
        comparable: whether timesteps can be compared at every step without waiting. Where they cannot, a run without
            scheduler timesteps has no forecast.
        memory: where the values are stored for graphs to read; None passes them on as they are.
        graphs: records the prologue itself too; None runs it launch by launch.
    """

    def __init__(
        self,
        lowered: LoweredPrologue,
        bind: Callable[[LoweredPart], tuple[Any, ...]],
        *,
        key: ForecastKey,
        comparable: bool,
        memory: HoistedMemory | None = None,
        graphs: PrologueGraphs | None = None,
    ) -> None:
        self._lowered = lowered
        self._memory = memory
        self._graphs = graphs
        self._bind = bind
        self._key = key
        self._comparable = comparable
        self._foreseen = lowered.forecast(key) if comparable or key.run is not None else None
        self._given_timesteps: Timesteps | None = None
        self._visited: list[int] = []
        self._first = key.run.first if key.run is not None else StepIndex(0)
        self._trusted = False  # some step took its values from the forecast without comparing
        self.begin()

    def begin(self) -> None:
        """The next call belongs to another request."""
        self._once: dict[str, torch.Tensor] | None = None
        self._given: Values = []
        self._all_known = False  # whether the values of all steps are known
        self._steps: tuple[torch.Tensor, ...] = ()  # those values, `[steps, ...]` each, where no memory holds them

    def at(self, step: StepIndex, call: Call) -> dict[str, torch.Tensor]:
        """The hoisted values in `step` by name."""
        lowered, leaves = self._lowered, call.leaves
        each = lowered.each.part
        if self._once is None:
            foreseen = self._foreseen if each.results and (step == self._first or self._comparable) else None
            self._compute(leaves, foreseen)
        assert self._once is not None
        if not each.results:
            return self._once if self._memory is None else self._memory.tensors
        timesteps = tuple(leaves[index] for index in lowered.prologue.timesteps)
        self._write_down(step, timesteps)
        if self._all_known and self._comparable and not self._is_foreseen(step, timesteps):
            self._all_known, self._steps = False, ()
        if self._all_known:
            self._trusted = not self._comparable
            if self._memory is not None:
                return self._memory.select(step)
            values = tuple(value[step] for value in self._steps)
        else:
            inputs = [leaves[index] for index in each.inputs]
            values = lowered.each.run(*self._bind(lowered.each), *inputs, *self._given)
        found = dict(zip(each.results, values, strict=True))
        return {**self._once, **found} if self._memory is None else self._memory.put(found)

    def end(self) -> None:
        """The run is over: learn its timesteps.

        Raises:
            RunError: they are not those that it was computed with.
        """
        given, foreseen = self._given_timesteps, self._foreseen
        if given is None:
            return
        wrong = False
        if self._trusted and foreseen is not None:
            rows = self._visited
            wrong = not all(torch.equal(a[rows], b[rows]) for a, b in zip(foreseen, given, strict=True))
        if wrong:
            self._lowered.forget(self._key)
        if len(self._visited) == self._lowered.steps - self._first:
            self._lowered.learn(self._key, given)
        if wrong:
            raise RunError(
                "this run came with other timesteps than the last one of the same scheduler timesteps, and was "
                "computed with those: its result is wrong, the next run will be right. A step was left out or "
                "repeated, or the pipeline changes timesteps from run to run"
            )

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it computed itself and keeps between calls."""
        yield from (self._once or {}).values()
        for kept in (self._given, self._steps, self._foreseen or (), self._given_timesteps or ()):
            yield from kept

    def _compute(self, leaves: Sequence[Any], foreseen: Timesteps | None) -> None:
        """Compute the values of a request, and those of all its steps where their timesteps are foreseen."""
        lowered, memory = self._lowered, self._memory
        once = self._bind(lowered.once)  # first: if weights have moved, this drops the graphs
        if memory is not None and self._graphs is not None and foreseen is not None and lowered.batches:
            body = functools.partial(_fill, lowered, memory, once, self._bind(lowered.each))
            self._graphs.run_prologue(lowered, leaves, foreseen, body)
            self._once, self._all_known = memory.tensors, lowered.batches
            self._given = [memory.tensors[name] for name in lowered.each.part.given]
            return
        self._once = lowered.of_request(once, leaves)
        self._given, steps = lowered.given(self._once), None
        if foreseen is not None:
            steps = lowered.in_steps(foreseen, self._bind(lowered.each), leaves, self._given)
        self._all_known = steps is not None
        if memory is not None:
            memory.begin(self._once, lowered.each.part.results, steps)
        elif steps is not None:
            self._steps = steps

    def _write_down(self, step: StepIndex, timesteps: Timesteps) -> None:
        if self._given_timesteps is None:
            with torch.inference_mode(False):
                self._given_timesteps = tuple(t.new_empty((self._lowered.steps, *t.shape)) for t in timesteps)
            for log_, timestep in zip(self._given_timesteps, timesteps, strict=True):
                log_[:step] = timestep  # skipped steps are computed too, with any timestep that the model takes
        for log_, timestep in zip(self._given_timesteps, timesteps, strict=True):
            log_[step].copy_(timestep)
        self._visited.append(step)

    def _is_foreseen(self, step: StepIndex, timesteps: Timesteps) -> bool:
        foreseen = self._foreseen
        return foreseen is not None and all(torch.equal(a[step], b) for a, b in zip(foreseen, timesteps, strict=True))


def _fill(
    lowered: LoweredPrologue,
    memory: HoistedMemory,
    once: tuple[Any, ...],
    each: tuple[Any, ...],
    leaves: Sequence[Any],
    foreseen: Sequence[torch.Tensor],
) -> None:
    """The body of a prologue graph: compute all values of a run with these weights and constants, into `memory`."""
    of_request = lowered.of_request(once, leaves)
    memory.begin(
        of_request, lowered.each.part.results, lowered.in_steps(foreseen, each, leaves, lowered.given(of_request))
    )
