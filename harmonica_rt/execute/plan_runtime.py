"""A plan at work: lowered programs, the parameters of the current run, and memory for its streams."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harmonica_rt.engine import RunKey
from harmonica_rt.execute.arena_pool import ArenaPool, StreamMemory
from harmonica_rt.execute.cuda_graphs import Graphs, Pool
from harmonica_rt.execute.forecast import Forecast, ForecastKey, Forecasts
from harmonica_rt.execute.graph_memory import GraphMemory
from harmonica_rt.execute.graphed_prologue import GraphedPrologue
from harmonica_rt.execute.launch_order import LaunchOrder
from harmonica_rt.execute.launched_stream import LaunchedStream
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.parameter_binding import ParameterBinding, Parameters
from harmonica_rt.execute.plan_stream import PlanStream
from harmonica_rt.execute.slot_buffers import SlotBuffers
from harmonica_rt.execute.stream_prologue import StreamPrologue
from harmonica_rt.execute.whole_run_stream import WholeRunStream

log = logging.getLogger(__name__)


class PlanRuntime:
    """A lowered plan with the parameters of the current run and the arenas of its streams.

    Args:
        lowered: the plan.
        parameters: see `ParameterBinding`.
        device: where its calls run.
        graphs: how step programs become CUDA graphs, in a pool of this plan; None runs them launch by launch.
        debug: fill slots with NaN before they are written and after their last read.

    Attributes:
        lowered: as given.
        parameters: what programs are bound to in this run.
        arenas: the memory of its streams.
        launches: the order of launches on that memory.
        forecasts: the timesteps that its streams are expected to get.
        pool: records step programs as graphs; None where none are recorded.
        compile_seconds: wall time of making the plan, checks included; set by `Plans.add`.
        kernel_seconds: the part of it that compiling Triton kernels took; set by `Plans.add`.
    """

    def __init__(
        self,
        lowered: LoweredPlan,
        parameters: Parameters,
        device: torch.device,
        *,
        graphs: Graphs | None,
        debug: bool,
    ) -> None:
        self.lowered = lowered
        self.pool = _pool(graphs, device, parameters)
        self.arenas = ArenaPool(_memory(lowered, self.pool, measured=graphs is not None and graphs.measured))
        on_addresses = self.arenas.begin_run_of_graphs if self.pool is not None else None
        self.parameters = ParameterBinding(parameters, lowered.plan.captured.constants, on_addresses)
        self.launches = LaunchOrder(lowered.devices())
        self.forecasts = Forecasts(len(lowered.plan.steps))
        self.compile_seconds = 0.0
        self.kernel_seconds = 0.0
        self._run: RunKey | None = None
        self._debug = debug

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now: arenas, the inputs of graphs, and what graphs reserved."""
        reserved = self.pool.nbytes if self.pool is not None else 0
        return self.arenas.slot_bytes + self.arenas.static_bytes + reserved

    @property
    def in_use(self) -> bool:
        """Whether the current run has a stream of this plan."""
        return self.arenas.lent > 0

    def begin_run(self, key: RunKey | None = None) -> None:
        """Take back all arenas, to be lent in the same order again; parameters are fetched anew at their first use."""
        self._run = key
        self.arenas.begin_run()
        self.parameters.begin_run()

    def new_stream(self) -> PlanStream[Any]:
        """A stream with arenas of its own."""
        key = ForecastKey(self._run, self.arenas.lent)
        memory = self.arenas.lend()
        buffers, graphed, prologue = memory.buffers, memory.graphed, self.lowered.prologue
        if self._debug:
            with self.launches.turn(lambda: buffers.arenas.values()):
                buffers.poison_all()
        given = self.lowered, self.parameters, self.launches, buffers
        if graphed is not None:
            forecast = Forecast(self.forecasts, key, comparable=False, log=graphed.log)
            values = GraphedPrologue(prologue, self.parameters.of, forecast, graphed) if prologue is not None else None
            return WholeRunStream(*given, values, memory=graphed, debug=self._debug)
        forecast = Forecast(self.forecasts, key, comparable=self.lowered.takes_inputs_on_cpu)
        own = StreamPrologue(prologue, self.parameters.of, forecast) if prologue is not None else None
        return LaunchedStream(*given, own, debug=self._debug)


def _pool(graphs: Graphs | None, device: torch.device, parameters: Parameters) -> Pool | None:
    """The pool of a plan for calls on `device`; None where no graphs are recorded."""
    pool = graphs.make_pool(device) if graphs is not None else None
    if pool is not None and any(map(is_traceable_wrapper_subclass, parameters().values())):
        log.info(
            "no CUDA graphs: some parameters are made of other tensors (quantised?), which may be replaced unnoticed"
        )
        return None
    return pool


def _memory(lowered: LoweredPlan, pool: Pool | None, *, measured: bool) -> Callable[[], StreamMemory]:
    """A function that makes the memory of one stream."""

    def make() -> StreamMemory:
        graphed = GraphMemory(lowered, pool, measured=measured) if pool is not None else None
        return StreamMemory(SlotBuffers(lowered.plan), graphed)

    return make
