"""Runs the prologue of one stream as graphs: for all steps at once if timesteps are foreseen, else for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from harmonica_rt.execute.forecast import Forecast, Timesteps
from harmonica_rt.execute.graph_memory import GraphMemory
from harmonica_rt.execute.graph_replay import Recordable
from harmonica_rt.execute.lowered_prologue import LoweredPart, LoweredPrologue
from harmonica_rt.execute.stream_prologue import Bind
from harmonica_rt.indices import StepIndex


class GraphedPrologue:
    """The hoisted values of one stream in one run, at fixed addresses.

    Args:
        lowered: the prologue.
        bind: returns the parameters and constants of a part, as the model holds them in this run.
        forecast: the timesteps that the stream is expected to be given; its log is that of `memory`.
        memory: where the values lie, and the graphs.
    """

    def __init__(self, lowered: LoweredPrologue, bind: Bind, forecast: Forecast, memory: GraphMemory) -> None:
        self._lowered = lowered
        self._bind = bind
        self._forecast = forecast
        self._memory = memory
        self._has_request = False  # whether the values of the current request are in memory
        self._has_steps = False  # whether those of all its steps are
        self._joined: tuple[Any, ...] = ()  # the parameters that the joined tensors in memory were made of

    def begin(self) -> None:
        """The next call belongs to another request."""
        self._has_request = self._has_steps = False

    def prepare(self, step: StepIndex) -> None:
        """Make the values of `step` available to `load`. The leaves of its call must be in memory already."""
        memory, forecast, each = self._memory, self._forecast, self._lowered.each.part
        if not self._has_request:
            self._begin_request(forecast.usable_at(step) if each.results else None)
        elif self._bind(self._lowered.joined) is not self._joined:  # replaced or moved since
            self._join()
        if not each.results:
            return
        timesteps = self._timesteps()
        forecast.visit(step, timesteps)
        forecast.log.write(step, timesteps, but=memory.counter.device)
        if self._has_steps:
            forecast.trusted = True
        else:
            self._run("step", (self._lowered.each,), lambda each: self._compute_step(step, each))
        memory.hoisted.load_elsewhere(step, memory.counter)

    def prepare_run(self, timesteps: Timesteps) -> bool:
        """Make the values of all steps available to `load`; False if each step has to be prepared.

        Args:
            timesteps: `[steps, ...]` for each timestep argument. They are certain: nothing is compared afterwards.
        """
        has_results = bool(self._lowered.each.part.results)
        if not self._has_request:
            self._begin_request(timesteps if has_results else None)
        return not has_results or (self._has_steps and self._memory.hoisted.lies_on(self._memory.counter.device))

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The leaves that are its timesteps."""
        return self._lowered.prologue.timesteps

    def load(self) -> None:
        """Load the values of the current step, and write down its timesteps: a part of the step's graph."""
        if self._lowered.each.part.results:
            self._memory.hoisted.load(self._memory.counter)
            self._forecast.log.write_at(self._memory.counter, self._timesteps())

    def end(self) -> None:
        """The run is over: learn its timesteps.

        Raises:
            RunError: they are not those that it was computed with.
        """
        self._forecast.end()

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that it keeps between calls, besides those of its memory."""
        yield from self._forecast.tensors()

    def _begin_request(self, foreseen: Timesteps | None) -> None:
        """Compute the values of the request, and those of all its steps where their timesteps are foreseen."""
        lowered, memory = self._lowered, self._memory
        if foreseen is not None and lowered.batches:
            memory.foreseen.put({str(number): values for number, values in enumerate(foreseen)})
            self._run("run", (lowered.once, lowered.each), self._compute_run)
            self._has_steps = lowered.batches
        else:
            self._run("request", (lowered.once,), self._compute_request)
        self._joined = self._bind(lowered.joined)
        self._has_request = True

    def _run(self, what: str, parts: tuple[LoweredPart, ...], compute: Callable[..., None]) -> None:
        """Run `compute`, which stores values, on what `parts` are bound to; as a graph once it has run plainly."""
        bound = [self._bind(part) for part in parts]  # first: if parameters have moved, this drops the graphs
        memory, key = self._memory, (self._lowered, what)

        def body() -> tuple[Any, ...]:
            compute(*bound)
            return ()

        def recordable() -> Recordable:
            if key not in memory.allocated:
                body()
                memory.allocated.add(key)
            return Recordable(f"the prologue of a {what}", key, tuple(part.part for part in parts), body, lambda: None)

        memory.graphs.run(key, recordable)

    def _join(self) -> None:
        """Make the joined tensors of the present parameters."""
        joined = self._lowered.joined
        self._joined = self._bind(joined)
        self._memory.hoisted.put_joined(joined.by_name(self._joined))

    def _compute_request(self, once: tuple[Any, ...]) -> None:
        self._join()
        self._memory.hoisted.put_request(self._lowered.of_request(once, self._memory.leaves.tensors))

    def _compute_run(self, once: tuple[Any, ...], each: tuple[Any, ...]) -> None:
        lowered, memory = self._lowered, self._memory
        self._join()
        request = lowered.of_request(once, memory.leaves.tensors)
        memory.hoisted.put_request(request)
        foreseen = list(memory.foreseen.tensors.values())
        steps = lowered.in_steps(foreseen, each, memory.leaves.tensors, lowered.given(request))
        if steps is not None:
            memory.hoisted.put_steps(lowered.each.part.results, steps)

    def _compute_step(self, step: StepIndex, each: tuple[Any, ...]) -> None:
        part, memory = self._lowered.each.part, self._memory
        inputs = [memory.leaves.tensors[index] for index in part.inputs]
        given = [memory.hoisted.tensors[name] for name in part.given]
        values = self._lowered.each.run(*each, *inputs, *given)
        memory.hoisted.put_step(dict(zip(part.results, values, strict=True)), step, memory.counter)

    def _timesteps(self) -> Timesteps:
        tensors = (self._memory.leaves.tensors[index] for index in self._lowered.prologue.timesteps)
        return tuple(tensor for tensor in tensors if tensor is not None)
