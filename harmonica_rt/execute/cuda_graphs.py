"""CUDA graphs: the launches of a step are recorded once, and then repeated with a single launch.

A graph holds addresses, so everything it reads and writes must stay in place. The values it computes lie in a pool that
all graphs of a plan share: the outputs of one are overwritten by the next, and must be copied at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from harmonica_rt.execute.launch_order import has_streams

MAX_FAILURES = 3  # failed recordings allowed per pool; torch does not free the memory that each one took

# torch allows one recording at a time. Its CUDA streams are few and handed out in turn, so two pools may get the same
# one: what one thread launches there would end up in the recording of another thread.
_RECORDING = threading.Lock()

Body = Callable[[], tuple[Any, ...]]  # launches that a graph may hold; returns their outputs


class Graph(Protocol):
    """A recorded body."""

    def replay(self) -> tuple[Any, ...]:
        """Run the body again; its outputs are valid until another graph of the pool is replayed."""


class Pool(Protocol):
    """Records bodies into memory that they share, on one device."""

    nbytes: int
    device: torch.device

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """Run `body` once as it will be recorded, so that recording loads and tunes nothing; return its outputs."""

    def record(self, body: Body) -> Graph:
        """Record `body`, which must have been warmed up.

        Raises:
            RuntimeError: something in it cannot be recorded. Other bodies still can.
        """

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time of `run` until the device is done."""


@dataclass(frozen=True)
class Graphs:
    """How steps become graphs.

    Attributes:
        make_pool: makes the pool of a plan on a device; returns None where the device has no graphs.
        measured: keep a graph only if it is not slower than the launches it replaces.
    """

    make_pool: Callable[[torch.device], Pool | None]
    measured: bool


def graphs_of(mode: str) -> Graphs | None:
    """How graphs are made for a mode of `CompileOptions.graphs`; None for no graphs."""
    return None if mode == "off" else Graphs(_cuda_pool, measured=mode == "auto")


def _cuda_pool(device: torch.device) -> Pool | None:
    return CudaPool(device) if has_streams(device) else None


@dataclass(frozen=True, eq=False)
class _Place:
    """Where graphs are recorded: a private pool by its handle, and the CUDA stream that its memory belongs to."""

    handle: Any
    stream: torch.cuda.Stream


class CudaPool:
    """One private memory pool and one CUDA stream for all graphs of a plan. Its memory is freed with the graphs.

    A recording that fails leaves its pool open (`CUDAGraph.capture_end` raises before it closes the pool), and torch
    refuses to record into an open pool. So the place is marked unusable before a recording begins, and usable again
    only when it has ended well; otherwise the next recording makes a new place. Graphs recorded earlier keep the old
    pool alive. torch counts a recording that could not be ended as a permanent user of its pool, so the memory that it
    took is lost: after a few such failures nothing more is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self.device = device
        self._place = self._new_place()
        self._anchor: Graph | None = None  # a pool is freed with its last graph, and its handle is invalid from then on
        self._failures = 0
        self._usable = True

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """See `Pool.warm_up`. It uses the CUDA stream that records, as libraries keep workspaces per CUDA stream."""
        with _RECORDING:
            stream, current = self._usable_place().stream, torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs = body()
            current.wait_stream(stream)
            for output in outputs:
                if isinstance(output, torch.Tensor):  # the caller's now, though the recording stream allocated it
                    output.record_stream(current)
            return outputs

    def record(self, body: Body) -> Graph:
        """See `Pool.record`. The same thread must have run `body` before: libraries create handles per thread."""
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(
                f"{self._failures} recordings of this plan have failed, and torch does not free the memory they took"
            )
        with _RECORDING:
            torch.cuda.synchronize(self.device)
            place = self._usable_place()
            self._usable = False
            if self._anchor is None:
                torch.cuda.empty_cache()  # a private pool cannot take cached memory, only what is free on the device
                self._anchor = self._recorded(place, lambda: (torch.zeros(1, device=self.device),))
            graph = self._recorded(place, body)
            self._usable = True
            return graph

    def seconds(self, run: Callable[[], object]) -> float:
        """See `Pool.seconds`."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _new_place(self) -> _Place:
        return _Place(torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device))

    def _usable_place(self) -> _Place:
        if not self._usable:
            self._place, self._anchor, self._usable = self._new_place(), None, True
        return self._place

    def _recorded(self, place: _Place, body: Body) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.stream(place.stream), _own_workspaces():
            before = torch.cuda.memory_reserved(self.device)
            try:
                graph.capture_begin(pool=place.handle, capture_error_mode="thread_local")
                outputs = body()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, place)
                raise
            finally:
                self.nbytes += torch.cuda.memory_reserved(self.device) - before
        return _CudaGraph(graph, outputs)

    def _abandon(self, graph: torch.cuda.CUDAGraph, place: _Place) -> None:
        """End a recording and the allocation to its pool, however far it got."""
        try:
            graph.capture_end()
        except RuntimeError:  # reports again that the recording failed
            self._failures += 1
        finally:
            with contextlib.suppress(RuntimeError):  # the pool is closed already, as it should be
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), place.handle)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Let a recording on the current CUDA stream take its cuBLAS workspaces from its own pool.

    torch keeps one workspace per handle and CUDA stream (before 2.12, in graphs too). A graph that used an existing one
    would share it with plain launches, and one from its pool that was kept afterwards would be overwritten by graphs.
    The thread's handle is created first, because that is not allowed while recording.
    """
    torch.cuda.current_blas_handle()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Any, ...]) -> None:
        self._graph = graph
        self._outputs = outputs

    def replay(self) -> tuple[Any, ...]:
        self._graph.replay()
        return self._outputs


def copies(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The outputs with every tensor copied."""
    return tuple(output.clone() if isinstance(output, torch.Tensor) else output for output in outputs)
