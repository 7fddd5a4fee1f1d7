"""A double of `torch.cuda` on a CPU, that behaves as torch does where graphs and CUDA streams go wrong.

It records what is asked of it (`calls`), and what would be an error on a device without any message (`faults`): memory
that one CUDA stream uses while another may still write it, and workspaces that a graph shares with what runs outside.
Graphs hold the very tensors that they were recorded with. While recording, nothing is written; what an operator returns
lies in the graph's pool, and turns to NaN when another graph of the pool is replayed.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from harmonica_rt.execute import cuda_graphs as graphs
from harmonica_rt.execute import launch_order as launches
from harmonica_rt.execute import plan_cache as plans
from tests.cuda_pools import Pools, Workspaces
from tests.cuda_streams import Accesses, DoubleEvent, DoubleStream, Seen

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm}
FORBIDDEN = {aten._local_scalar_dense}  # in a recording: the host would wait


class DoubleGraph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: CudaDouble) -> None:
        self._cuda = cuda
        self._stream = cuda.current_stream()
        self._ended = False
        self.pool = 0
        self.tape: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.made: list[torch.Tensor] = []

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        cuda, self.pool = self._cuda, pool
        cuda.calls.append("begin")
        self._stream = cuda.current_stream()
        if self._stream is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        cuda.pools.open(pool)
        self._stream.recording, self._stream.invalid = self, False

    def capture_end(self) -> None:
        cuda, stream = self._cuda, self._stream
        cuda.calls.append("end")
        if cuda.current_stream() is not stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if stream.recording is not self:
            raise RuntimeError("operation not permitted: no capture is under way")
        stream.recording = None
        if stream.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")  # and the pool stays open
        cuda.pools.close(self.pool)
        self._ended = True
        cuda.graphs.add(self)

    def take(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operator; what it returns lies in the pool."""
        if func.overloadpacket in FORBIDDEN:
            self._stream.refuse()
        if func._schema.is_mutable:
            self.tape.append((func, args, kwargs, []))
            written = [value for value, argument in _bound(func, args, kwargs) if _is_written(argument)]
            return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
        result = func(*args, **kwargs)
        if not _is_view(func):
            outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.tape.append((func, args, kwargs, outputs))
            self.made += outputs
            self._cuda.pools.bytes[self.pool] += sum(output.nbytes for output in outputs)
        return result

    def replay(self) -> None:
        assert self._ended, "Called CUDAGraph::replay without a preceding successful capture."
        cuda = self._cuda
        cuda.calls.append("replay")
        others = {id(t) for graph in cuda.graphs if graph.pool == self.pool and graph is not self for t in graph.made}
        with _disable_current_modes():
            for graph in cuda.graphs:
                for tensor in graph.made if graph.pool == self.pool else ():
                    if id(tensor) in others and tensor.is_floating_point():
                        tensor.fill_(torch.nan)
            for func, args, kwargs, outputs in self.tape:
                result = func(*args, **kwargs)
                fresh = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                for output, value in zip(outputs, fresh, strict=False):
                    output.copy_(value)
        for func, args, kwargs, outputs in self.tape:
            cuda.note(func, args, kwargs, outputs, fresh=False)

    def __del__(self) -> None:
        if self._ended:
            self._cuda.pools.release(self.pool)


class CudaDouble(TorchDispatchMode):
    """All of `torch.cuda` that is used; active in the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.faults: list[str] = []
        self.graphs: weakref.WeakSet[DoubleGraph] = weakref.WeakSet()
        self.host: Seen = Counter()  # what the host waited for
        self.default = self._stream()
        self.streams: list[DoubleStream] = []
        self.pools = Pools()
        self.recorded_on: set[tuple[int, DoubleStream]] = set()  # (address, stream) of `record_stream`
        self._here = threading.local()
        self._workspaces = Workspaces(self.faults)
        self._accesses = Accesses(self.faults)

    def _stream(self) -> DoubleStream:
        return DoubleStream(self.calls, self.host)

    def current_stream(self, device: Any = None) -> DoubleStream:
        return getattr(self._here, "stream", self.default)

    def new_stream(self, device: Any = None) -> DoubleStream:
        self.streams.append(self._stream())
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: DoubleStream) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._here.stream = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def synchronize(self, device: Any = None) -> None:
        if self.current_stream().recording is not None:
            self.current_stream().refuse()
        self.calls.append("synchronize")
        for stream in (self.default, *self.streams):
            self.host |= stream.seen

    def memory_reserved(self, device: Any = None) -> int:
        return self.pools.reserved()

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.pools.give_back()

    def current_blas_handle(self) -> int:
        self.calls.append("handle")
        self._workspaces.use(self.current_stream())
        return 1

    def clear_workspaces(self) -> None:
        self.calls.append("clear")
        self._workspaces.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _all_real((args, kwargs)):
            return func(*args, **kwargs)
        stream = self.current_stream()
        if func.overloadpacket in PRODUCTS:
            self._workspaces.use(stream)
        if stream.recording is not None:
            return stream.recording.take(func, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if _all_real(outputs):
            self.note(func, args, kwargs, outputs, fresh=not _is_view(func) and not func._schema.is_mutable)
        return result

    def note(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor], *, fresh: bool) -> None:
        """Note a launch on the current stream, and a fault if another stream may still use what it touches."""
        if _is_view(func):
            return
        stream = self.current_stream()
        number = stream.launch()
        for value, argument in _bound(func, args, kwargs):
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self._accesses.add(tensor, stream, number, writes=_is_written(argument), by=func)
        for tensor in outputs:
            if fresh:
                self._accesses.begin(tensor, stream, number)


def _all_real(values: Any) -> bool:
    """Whether no tensor is a fake one, as there are while a model is traced."""
    tensors = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)


def _bound(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The values of a call, each with its argument in the schema."""
    arguments = func._schema.arguments
    named = {argument.name: argument for argument in arguments}
    return [*zip(args, arguments, strict=False), *((value, named[name]) for name, value in kwargs.items())]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(func: Any) -> bool:
    return not func._schema.is_mutable and any(result.alias_info is not None for result in func._schema.returns)


@contextmanager
def in_place_of_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDouble]:
    """The double in the place of `torch.cuda`; devices are CPUs that have CUDA streams. No fault may be left."""
    double = CudaDouble()
    replaced: dict[str, Callable[..., Any]] = {
        "CUDAGraph": lambda: DoubleGraph(double),
        "Event": DoubleEvent,
        "Stream": double.new_stream,
        "graph_pool_handle": double.pools.new_handle,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=1 << 20),
    }
    same = "stream device synchronize memory_reserved empty_cache current_stream current_blas_handle"
    replaced |= {name: getattr(double, name) for name in same.split()}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", double.clear_workspaces, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: double.pools.close(pool), raising=False
    )
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: double.recorded_on.add((tensor.untyped_storage().data_ptr(), stream)),
    )
    for module in (graphs, launches, plans):
        monkeypatch.setattr(module, "has_streams", lambda device: True)
    with double:
        yield double
    assert double.faults == []
