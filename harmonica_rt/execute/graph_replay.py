"""The CUDA graphs of one stream: what runs plainly first, is recorded next, and replayed from then on."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from harmonica_rt.execute.cuda_graphs import Body, Graph, Pool, copies
from harmonica_rt.lower.cuda_graph_rules import GraphRefusal, obstacle
from harmonica_rt.plan.step_graph import TabledGraph

log = logging.getLogger(__name__)

MOST_OF_PLAIN = 1.02  # a graph is kept if it takes at most this multiple of the time of plain launches
ROUNDS = 3  # of measurement; the best time counts
MOVES = 3  # consecutive runs with moved parameters after which graphs are no longer recorded anew
RESTLESS = GraphRefusal("parameters are at new addresses in every run (is offloading on?)")


@dataclass(frozen=True, eq=False)
class Recordable:
    """Launches that may become a graph.

    Attributes:
        name: what they are, for messages.
        owner: what a refusal is kept under; it holds for everything with this owner.
        parts: the graphs of operators that run in `body`.
        body: launches them, reading and writing at fixed addresses only; returns the outputs.
        restore: makes `body` run for the same step again.
        candidates: bodies that do the same, of which the fastest graph is kept; empty for `body` alone.
        choose: told the seconds of each candidate's graph; infinite for one that cannot be recorded.
        measured: whether the graph is kept only if it is not slower; False where all that it consists of was measured.
    """

    name: str
    owner: Hashable
    parts: tuple[TabledGraph, ...]
    body: Body
    restore: Callable[[], None]
    candidates: tuple[Body, ...] = ()
    choose: Callable[..., object] | None = None
    measured: bool = True


class GraphedPrograms:
    """The graphs of one stream.

    A body runs plainly at its first use, which warms it up, is recorded at its second, and replayed from then on. A
    thread records only what it warmed up itself: libraries create handles per thread, which recording forbids.

    Args:
        pool: records the graphs.
        measured: keep a graph only if it is not slower than plain launches.

    Attributes:
        refusals: why something runs plainly, by `Recordable.owner`.
    """

    def __init__(self, pool: Pool, *, measured: bool) -> None:
        self.refusals: dict[Hashable, GraphRefusal] = {}
        self._pool = pool
        self._measured = measured
        self._warm = _Warm()
        self._graphs: dict[Hashable, Graph] = {}
        self._moves = 0  # consecutive runs, up to this one, in which something had moved

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def begin_run(self, *, moved: bool) -> None:
        """A run begins; `moved` says that something whose address graphs hold was replaced, so they are dropped."""
        self._moves = self._moves + 1 if moved else 0
        if moved:
            self._graphs.clear()
        else:
            self.refusals = {whose: reason for whose, reason in self.refusals.items() if reason is not RESTLESS}

    def run(self, key: Hashable, recordable: Callable[[], Recordable]) -> tuple[Any, ...]:
        """Replay the graph that is kept under `key`; if there is none, run the launches, or record and replay them.

        Args:
            key: stands for these launches at these addresses.
            recordable: returns the launches; called only if there is no graph.

        Returns:
            The outputs, which are the caller's to keep.
        """
        graph = self._graphs.get(key)
        return copies(graph.replay()) if graph is not None else self._run(key, recordable())

    def consists_of_graphs(self, key: Hashable, parts: Iterable[Hashable], *, entirely: bool) -> bool:
        """Whether all `parts` are graphs, and what is kept under `key`, which consists of them, was not refused.

        If it consists `entirely` of them, and this thread has warmed them up, it is warm too.
        """
        known = set(parts)
        if key in self.refusals or not known <= self._graphs.keys():
            return False
        if entirely and known <= self._warm.keys:
            self._warm.keys.add(key)
        return True

    def forget(self, key: Hashable) -> None:
        """Drop the graph that is kept under `key`, and whatever else is known of it."""
        self._graphs.pop(key, None)
        self.refusals.pop(key, None)
        self._warm.keys.discard(key)

    def _run(self, key: Hashable, work: Recordable) -> tuple[Any, ...]:
        if self._moves >= MOVES:
            self.refusals.setdefault(work.owner, RESTLESS)
        if work.owner in self.refusals:
            return work.body()
        if key not in self._warm.keys:
            reason = next(filter(None, (obstacle(part, self._pool.device) for part in work.parts)), None)
            if reason is not None:
                return self._refuse(work, reason)
            return self._warm_up(key, work)
        reason = self._record(key, work)
        return copies(self._graphs[key].replay()) if reason is None else self._refuse(work, reason)

    def _warm_up(self, key: Hashable, work: Recordable) -> tuple[Any, ...]:
        first, *others = work.candidates or (work.body,)
        with _casting_anew():
            outputs = self._pool.warm_up(first)
            for other in others:
                work.restore()
                outputs = self._pool.warm_up(other)
        self._warm.keys.add(key)
        return outputs

    def _record(self, key: Hashable, work: Recordable) -> GraphRefusal | None:
        """Record the launches, or say why not."""
        body = work.body
        try:
            if work.candidates:
                graph, body = self._fastest(work)
            else:
                graph = self._recorded(body)
        except RuntimeError as error:
            return GraphRefusal(f"it cannot be recorded: {str(error).partition(chr(10))[0]}")
        if self._measured and work.measured:
            plain, replayed = (self._seconds(run, work) for run in (body, graph.replay))
            if replayed > MOST_OF_PLAIN * plain:
                times = f"it takes {replayed * 1e3:.2f} ms, plain launches take {plain * 1e3:.2f} ms"
                return GraphRefusal(f"a graph is slower: {times}")
        self._graphs[key] = graph
        return None

    def _fastest(self, work: Recordable) -> tuple[Graph, Body]:
        """The fastest graph of the candidates, and its body.

        Raises:
            RuntimeError: none can be recorded.
        """
        found: list[tuple[float, Graph, Body]] = []
        seconds: list[float] = []
        failure: RuntimeError | None = None
        for body in work.candidates:
            seconds.append(math.inf)
            try:
                graph = self._recorded(body)
            except RuntimeError as error:
                failure = error
                continue
            seconds[-1] = self._seconds(graph.replay, work)
            found.append((seconds[-1], graph, body))
        if not found:
            raise failure or RuntimeError("there is nothing to record")
        if work.choose is not None:
            work.choose(*seconds)
        _, graph, body = min(found, key=lambda each: each[0])
        return graph, body

    def _recorded(self, body: Body) -> Graph:
        with _casting_anew():
            return self._pool.record(body)

    def _seconds(self, run: Callable[[], object], work: Recordable) -> float:
        """The least seconds of several measurements. What follows runs for the same step once more."""
        found = []
        for _ in range(ROUNDS):
            found.append(self._pool.seconds(run))
            work.restore()
        return min(found)

    def _refuse(self, work: Recordable, reason: GraphRefusal) -> tuple[Any, ...]:
        log.info("%s runs without a graph: %s", work.name, reason)
        self.refusals[work.owner] = reason
        return work.body()


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
