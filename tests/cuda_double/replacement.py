"""The double in the place of `torch.cuda`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harmonica_rt.execute import cuda_graphs as graphs
from harmonica_rt.execute import launch_order as launches
from harmonica_rt.execute import plan_cache as plans
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.sampling import conditioning, timestep_order
from tests.cuda_double.double import REAL, CudaDouble
from tests.cuda_double.graphs import DoubleGraph
from tests.cuda_double.streams import DoubleEvent, DoubleStream


@contextmanager
def in_place_of_cuda(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Iterator[CudaDouble]:
    """The double in the place of `torch.cuda`; devices are CPUs that have CUDA streams. No fault may be left.

    Args:
        monkeypatch: undoes it.
        seed: of the order in which launches run.
    """
    double = CudaDouble(seed)
    _replace_cuda(double, monkeypatch)
    _replace_reads(double, monkeypatch)
    _take_cpus_for_devices(monkeypatch)
    with double:
        yield double
        double.synchronize()
    assert double.faults == [], f"seed {seed}"


def _replace_cuda(double: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        __module__ = "torch.cuda"

        def __new__(cls, device: Any = None, **_: Any) -> Any:
            return double.all_streams.next()

    class CUDAGraph(DoubleGraph):
        __module__ = "torch.cuda"

        def __init__(self, **_: Any) -> None:
            super().__init__(double)

    classes = {"CUDAGraph": CUDAGraph, "Event": DoubleEvent, "Stream": Stream}
    functions: dict[str, Callable[..., Any]] = {
        "graph_pool_handle": double.pools.new_handle,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=1 << 20),
        "current_device": lambda: 0,
    }
    same = "stream device synchronize memory_reserved empty_cache current_stream current_blas_handle"
    functions |= {name: getattr(double, name) for name in same.split()}
    for name, value in {**classes, **{name: _of_torch(value) for name, value in functions.items()}}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    inner: dict[str, Callable[..., Any]] = {
        "_cuda_clearCublasWorkspaces": double.clear_workspaces,
        "_cuda_endAllocateToPool": lambda device, pool: double.pools.close(pool),
    }
    for name, value in inner.items():
        monkeypatch.setattr(torch._C, name, _of_torch(value), raising=False)


def _replace_reads(double: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads memory without an operator waits for the current stream, as a copy to the host does."""
    cpu = torch.Tensor.cpu

    def record_stream(tensor: torch.Tensor, stream: DoubleStream) -> None:
        double.record_stream(tensor, stream)

    monkeypatch.setattr(torch.Tensor, "record_stream", _of_torch(record_stream))
    for name in ("cpu", "numpy", "tolist", "__deepcopy__", "__reduce_ex__"):
        read = getattr(torch.Tensor, name)

        def after_waiting(tensor: torch.Tensor, *args: Any, read: Any = read, **kwargs: Any) -> Any:
            if type(tensor) not in REAL or not double.is_alone:
                return read(tensor, *args, **kwargs)
            copied = double.on_the_host(tensor)
            return copied if read is cpu else read(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, _of_torch(after_waiting))


def _of_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that passes for one of torch: a model that calls it does not have it as a part."""

    def replaced(*args: Any, _inner: Callable[..., Any] = function, **kwargs: Any) -> Any:  # and no closure
        return _inner(*args, **kwargs)

    replaced.__module__ = "torch.cuda"
    return replaced


def _take_cpus_for_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read on the host just because it lies on a CPU."""
    for module in (graphs, launches, plans):
        monkeypatch.setattr(module, "has_streams", lambda device: True)
    monkeypatch.setattr(LoweredPlan, "takes_inputs_on_cpu", False)
    monkeypatch.setattr(PlannedEngine, "looks_late", property(lambda self: not self._ran_eagerly and bool(self.plans)))
    monkeypatch.setattr(conditioning, "_is_compared_at_once", lambda tensor: False)
    monkeypatch.setattr(timestep_order, "_timestep", lambda call: None)
