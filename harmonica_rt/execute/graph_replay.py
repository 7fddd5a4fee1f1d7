"""The CUDA graphs of one stream: one per step program and set of slot addresses, and one for the prologue."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from harmonica_rt.execute.cuda_graphs import Body, Graph, Pool, copies
from harmonica_rt.execute.lowered_prologue import LoweredPrologue
from harmonica_rt.execute.static_tensors import StaticTensors
from harmonica_rt.lower.cuda_graph_rules import GraphRefusal, obstacle
from harmonica_rt.lower.plain import Program

log = logging.getLogger(__name__)

PAYS = 0.98  # a graph is kept if it takes at most this fraction of the time of plain launches
ROUNDS = 3  # of measurement; the best time counts
MOVES = 3  # consecutive runs with moved parameters after which graphs are no longer recorded anew
RESTLESS = GraphRefusal("parameters are at new addresses in every run (is offloading on?)")


class GraphedPrograms:
    """The graphs of one stream and the static tensors that they read.

    A body runs plainly at its first use, which warms it up, is recorded at its second, and replayed from then on. A
    thread records only what it warmed up itself: libraries create handles per thread, which recording forbids.

    Args:
        pool: records the graphs.
        measured: keep a graph only where it is faster than plain launches.
    """

    def __init__(self, pool: Pool, *, measured: bool) -> None:
        self.refusals: dict[Hashable, GraphRefusal] = {}  # what runs plainly (programs, the prologue), and why
        self._pool = pool
        self._measured = measured
        self._warm = _Warm()
        self._graphs: dict[Hashable, Graph] = {}  # by a step's entry in `Plan.addressed_programs`, or by prologue
        self._moves = 0  # consecutive runs, up to this one, in which something had moved
        self._leaves = StaticTensors()
        self._request = StaticTensors()

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of the static tensors; the pool counts its own."""
        return self._leaves.nbytes + self._request.nbytes

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """The static tensors."""
        return itertools.chain(self._leaves.tensors.values(), self._request.tensors.values())

    def begin_run(self, *, moved: bool) -> None:
        """A run begins; `moved` says that something whose address graphs hold was replaced, so they are dropped."""
        self._moves = self._moves + 1 if moved else 0
        if moved:
            self._graphs.clear()
        else:
            self.refusals = {whose: reason for whose, reason in self.refusals.items() if reason is not RESTLESS}

    def run(
        self,
        number: int,
        program: Program,
        bound: tuple[Any, ...],
        leaves: Sequence[Any],
        slots: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        hoisted: Mapping[str, torch.Tensor],
    ) -> tuple[Any, ...]:
        """Run one step as `Program.__call__` does; the outputs are the caller's to keep.

        Args:
            number: the number of this program with these slot addresses; see `Plan.addressed_programs`.
            program: the program.
            bound: its parameters and constants.
            leaves: leaves of the call; those that the program takes are copied to where graphs read them.
            slots: the slots that it reads, and those that it writes.
            hoisted: values at fixed addresses.
        """
        self._leaves.put({str(index): leaves[index] for index in program.step.inputs})
        graph = self._graphs.get(number)
        if graph is not None:
            return copies(graph.replay())
        fixed = [self._leaves.tensors.get(str(index)) for index in range(len(leaves))]
        given = [hoisted[name] for name in program.step.hoisted]
        body = functools.partial(program, bound, fixed, *slots, given)
        return self._warm_up_or_record(number, program, body, lambda: obstacle(program.step, self._pool.device))

    def run_prologue(
        self,
        prologue: LoweredPrologue,
        leaves: Sequence[Any],
        foreseen: Sequence[torch.Tensor],
        body: Callable[[Sequence[Any], Sequence[torch.Tensor]], None],
    ) -> None:
        """Run the prologue of all steps.

        Args:
            prologue: the prologue.
            leaves: leaves of the call; those that it reads are copied to where its graph reads them.
            foreseen: the timesteps of all steps, one tensor per timestep argument; copied likewise.
            body: computes the values from the copied leaves and timesteps, and stores them at fixed addresses. Its
                first run allocates these, so it runs once before it is warmed up.
        """
        indices = {*prologue.once.part.inputs, *prologue.each.part.inputs} - {*prologue.prologue.timesteps}
        timesteps = {f"timesteps {number}": values for number, values in enumerate(foreseen)}
        self._request.put({**{str(index): leaves[index] for index in indices}, **timesteps})
        graph = self._graphs.get(prologue)
        if graph is not None:
            graph.replay()
            return
        tensors = self._request.tensors
        fixed = [tensors[str(index)] if index in indices else None for index in range(len(leaves))]

        def fill() -> tuple[Any, ...]:
            body(fixed, [tensors[name] for name in timesteps])
            return ()

        if prologue not in self._warm.keys:
            fill()
        parts = (prologue.once.part, prologue.each.part)
        self._warm_up_or_record(
            prologue,
            prologue,
            fill,
            lambda: next(filter(None, (obstacle(part, self._pool.device) for part in parts)), None),
        )

    def _warm_up_or_record(
        self, key: Hashable, whose: Hashable, body: Body, find_obstacle: Callable[[], GraphRefusal | None]
    ) -> tuple[Any, ...]:
        """Run `body` plainly, or record and replay it.

        Args:
            key: what its graph is kept under.
            whose: the program or prologue that a refusal applies to.
            body: what to run.
            find_obstacle: says why `body` cannot be recorded, before it is warmed up; None if it can.
        """
        if self._moves >= MOVES:
            self.refusals.setdefault(whose, RESTLESS)
        if whose in self.refusals:
            return body()
        if key not in self._warm.keys:
            reason = find_obstacle()
            if reason is not None:
                return self._refuse(whose, reason, body)
            with _casting_anew():
                outputs = self._pool.warm_up(body)
            self._warm.keys.add(key)
            return outputs
        reason = self._record(key, body)
        return copies(self._graphs[key].replay()) if reason is None else self._refuse(whose, reason, body)

    def _record(self, key: Hashable, body: Body) -> GraphRefusal | None:
        """Record `body` and keep its graph; otherwise return why not."""
        try:
            with _casting_anew():
                graph = self._pool.record(body)
        except RuntimeError as error:
            return GraphRefusal(f"it cannot be recorded: {str(error).partition(chr(10))[0]}")
        if self._measured:
            plain, replayed = (min(self._pool.seconds(run) for _ in range(ROUNDS)) for run in (body, graph.replay))
            if replayed > PAYS * plain:
                times = f"it takes {replayed * 1e3:.2f} ms, plain launches take {plain * 1e3:.2f} ms"
                return GraphRefusal(f"a graph does not pay: {times}")
        self._graphs[key] = graph
        return None

    def _refuse(self, whose: Hashable, reason: GraphRefusal, body: Body) -> tuple[Any, ...]:
        what = "the prologue" if isinstance(whose, LoweredPrologue) else "a step program"
        log.info("%s runs without a graph: %s", what, reason)
        self.refusals[whose] = reason
        return body()


class _Warm(threading.local):
    """What the current thread has warmed up."""

    def __init__(self) -> None:
        self.keys: set[Hashable] = set()


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Keep autocast from caching casts of parameters: a graph would hold the address of a cast that autocast frees."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
