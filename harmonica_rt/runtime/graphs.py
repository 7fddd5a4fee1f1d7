"""CUDA graphs: record the launches of a step once, send them again with one.

A graph holds addresses, so all it reads and writes must stay where it was. What it makes in between lies in a pool that
all graphs share: the outputs of one are overwritten by the next, and must be copied at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from harmonica_rt.errors import ArgumentError

MODES = ("auto", "on", "off")

Body = Callable[[], tuple[Any, ...]]


class Graph(Protocol):
    """A recorded body."""

    def replay(self) -> tuple[Any, ...]:
        """Run the body again; its outputs are good until another graph of the pool is replayed."""


class Pool(Protocol):
    """Records bodies into memory that they share, on one device."""

    nbytes: int
    device: torch.device

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """Run `body` once as it will be recorded, so that nothing is loaded or tuned while recording; its outputs."""

    def record(self, body: Body) -> Graph:
        """Record `body`, which was warmed up.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time of `run` until the device is done."""


@dataclass(frozen=True)
class Graphs:
    """How steps become graphs.

    Attributes:
        make_pool: makes the pool of a device; None where the device has no graphs.
        measured: keep a graph only where it is faster than the launches it stands for.
    """

    make_pool: Callable[[torch.device], Pool | None]
    measured: bool


def graphs_of(mode: str) -> Graphs | None:
    """The graphs that `compile(graphs=mode)` means; None for no graphs.

    Raises:
        ArgumentError: the mode is not one of `MODES`.
    """
    if mode not in MODES:
        raise ArgumentError(f"graphs={mode!r} is not known; choose one of {', '.join(MODES)}")
    return None if mode == "off" else Graphs(_cuda_pool, measured=mode == "auto")


def _cuda_pool(device: torch.device) -> Pool | None:
    return CudaPool(device) if device.type == "cuda" else None


class CudaPool:
    """One private memory pool and one stream for all graphs of a device."""

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self.device = device
        self._handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._anchor: Graph | None = None  # a pool is freed with its last graph, and its handle is no good from then on

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        """See `Pool.warm_up`: on the stream that records, because libraries keep workspaces for each stream."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = body()
        current.wait_stream(self._stream)
        return copies(outputs)  # made on the caller's stream: the originals belong to this one

    def record(self, body: Body) -> Graph:
        """See `Pool.record`."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_reserved(self.device)
        if self._anchor is None:
            self._anchor = self._recorded(lambda: (torch.zeros(1, device=self.device),))
        graph = self._recorded(body)
        self.nbytes += torch.cuda.memory_reserved(self.device) - before
        return graph

    def seconds(self, run: Callable[[], object]) -> float:
        """See `Pool.seconds`."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _recorded(self, body: Body) -> Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
                outputs = body()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says once more that the recording failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return _CudaGraph(graph, outputs)


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
