"""Step programs as graphs: one for each program and place of its slots, of one stream."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from harmonica_rt.lower.plain import Program
from harmonica_rt.passes.capturable import obstacle
from harmonica_rt.runtime.graphs import Body, Graph, Pool, copies
from harmonica_rt.runtime.static import StaticTensors

log = logging.getLogger(__name__)

PAYS = 0.98  # share of the time of plain launches that a graph may take to be kept
ROUNDS = 3  # of the measurement; the best counts

Place = tuple[int, ...]  # offsets of the slots that a program reads and writes


class GraphedPrograms:
    """The graphs of one stream and the static tensors that they read.

    A program runs plainly at its first use, which warms it up, is recorded at its second, and replayed from then on.

    Args:
        pool: records.
        measured: keep a graph only where it is faster than plain launches.
    """

    def __init__(self, pool: Pool, *, measured: bool) -> None:
        self.refusals: dict[Program, str] = {}  # programs that run plainly, and why
        self._pool = pool
        self._measured = measured
        self._warm: set[tuple[Program, Place]] = set()
        self._graphs: dict[tuple[Program, Place], Graph] = {}
        self._leaves = StaticTensors(trusted=False)
        self._hoisted = StaticTensors(trusted=True)

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of the static tensors; the pool counts its own."""
        return self._leaves.nbytes + self._hoisted.nbytes

    def forget(self) -> None:
        """Drop all graphs: something that they hold the address of was replaced."""
        self._graphs.clear()

    def __call__(
        self,
        program: Program,
        place: Place,
        bound: tuple[Any, ...],
        leaves: Sequence[Any],
        reads: Sequence[torch.Tensor],
        writes: Sequence[torch.Tensor],
        hoisted: Mapping[str, torch.Tensor],
    ) -> tuple[Any, ...]:
        """Run one step as `Program.__call__` does; the outputs are the caller's to keep."""
        step = program.step
        fixed = self._leaves.put({index: leaves[index] for index in step.inputs})
        given = self._hoisted.put({name: hoisted[name] for name in step.hoisted})
        body = functools.partial(
            program,
            bound,
            [fixed.get(index) for index in range(len(leaves))],
            reads,
            writes,
            [given[name] for name in step.hoisted],
        )
        if program in self.refusals:
            return body()
        key = (program, place)
        if key not in self._warm:
            self._warm.add(key)
            reason = obstacle(step)
            if reason is not None:
                return self._refuse(program, reason, body)
            return self._pool.warm_up(body)
        if key not in self._graphs:
            reason = self._record(key, body)
            if reason is not None:
                return self._refuse(program, reason, body)
        return copies(self._graphs[key].replay())

    def _record(self, key: tuple[Program, Place], body: Body) -> str | None:
        """Record `body`, or say why not."""
        try:
            graph = self._pool.record(body)
        except RuntimeError as error:
            return f"it cannot be recorded: {str(error).partition(chr(10))[0]}"
        if self._measured:
            plain, replayed = (min(self._pool.seconds(run) for _ in range(ROUNDS)) for run in (body, graph.replay))
            if replayed > PAYS * plain:
                return f"a graph does not pay: {replayed * 1e3:.2f} ms, plain launches take {plain * 1e3:.2f} ms"
        self._graphs[key] = graph
        return None

    def _refuse(self, program: Program, reason: str, body: Body) -> tuple[Any, ...]:
        log.info("a step program runs without a graph: %s", reason)
        self.refusals[program] = reason
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] is not program}
        return body()
