"""A plan at work: lowered programs, the weights of the current run, and streams that run them step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harmonica_rt.call.call import Call
from harmonica_rt.call.roles import Role
from harmonica_rt.engine import RunKey
from harmonica_rt.execute.cuda_graphs import Pool
from harmonica_rt.execute.graph_replay import GraphedPrograms
from harmonica_rt.execute.launch_order import LaunchOrder
from harmonica_rt.execute.prologue import ForecastKey, LoweredPart, LoweredPrologue, StreamPrologue
from harmonica_rt.execute.slot_buffers import SlotBuffers
from harmonica_rt.execute.static_tensors import HoistedMemory
from harmonica_rt.indices import ProgramId, SlotId, StepIndex
from harmonica_rt.lower import Lowering, lower
from harmonica_rt.lower.plain import Program
from harmonica_rt.plan.plan import Plan

log = logging.getLogger(__name__)

Weights = Callable[[], Mapping[str, torch.Tensor]]


class PlanRuntime:
    """A plan, lowered, with the weights of the current run and the arenas of its streams.

    Args:
        plan: the plan.
        weights: returns the model's parameters and buffers by name. The same mapping object means the same tensors,
            whatever their values.
        leaf_roles: roles of the leaves of its calls.
        lowering: one of `harmonica_rt.options.LOWERINGS`.
        debug: fill slots with NaN before they are written and after their last read.
        pool: records step programs as graphs, for this plan alone; None runs them launch by launch.
        measured: keep a graph only where it is faster.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        leaf_roles: Sequence[Role],
        *,
        lowering: str,
        debug: bool,
        pool: Pool | None = None,
        measured: bool = True,
    ) -> None:
        self.plan = plan
        self.roles = tuple(leaf_roles)
        self.debug = debug
        if pool is not None and any(map(is_traceable_wrapper_subclass, weights().values())):
            log.info("no graphs: weights are tensors made of others (quantised?), which are not seen to be replaced")
            pool = None
        self.pool = pool
        self.key: RunKey | None = None  # of the current run
        self.launches = LaunchOrder(_devices(plan))
        self._measured = measured
        self._comparable = pool is None and _on_cpu(plan)
        started = time.perf_counter()
        self.lowered: Lowering = lower(lowering, plan, leaf_roles)
        prologue = self.lowered.prologue
        self._prologue = (
            LoweredPrologue(prologue, plan.captured.root, len(plan.steps)) if prologue is not None else None
        )
        self.lower_seconds = time.perf_counter() - started
        self.compile_seconds = 0.0  # from the call to the plan, checks included; set by whoever made the plan
        self._catch_up: dict[StepIndex, tuple[Program, tuple[SlotId, ...]]] = {}
        self._fetch_weights = weights
        self._weights: Mapping[str, torch.Tensor] = {}
        self._weights_checked = False  # in this run
        self._bound: dict[Program | LoweredPart, tuple[Any, ...]] = {}
        self._free: list[_Memory] = []
        self._lent: list[_Memory] = []
        self._addresses: tuple[Any, ...] = ()
        offsets = [slot.offset for slot in plan.table.slots]
        keys = [(s.program, *(offsets[slot] for slot in (*s.reads, *s.writes))) for s in plan.steps]
        distinct = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self.places = tuple(distinct[key] for key in keys)  # per step, the number of its (program, addresses) pair

    @property
    def graphs(self) -> tuple[GraphedPrograms, ...]:
        """The graphs of all arenas."""
        return tuple(memory.graphs for memory in (*self._free, *self._lent) if memory.graphs is not None)

    @property
    def static_bytes(self) -> int:
        """Bytes of the tensors that graphs read their inputs from."""
        held = (*self._free, *self._lent)
        return sum(m.graphs.nbytes + m.hoisted.nbytes for m in held if m.graphs is not None and m.hoisted is not None)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all arenas held now: one set per concurrent stream."""
        return sum(memory.buffers.nbytes for memory in (*self._free, *self._lent))

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now: arenas, the inputs of graphs, and what graphs reserved."""
        return self.cache_bytes + self.static_bytes + (self.pool.nbytes if self.pool is not None else 0)

    @property
    def in_use(self) -> bool:
        """Whether the current run has a stream of this plan."""
        return bool(self._lent)

    def begin_run(self, key: RunKey | None = None) -> None:
        """Take back all arenas, to be lent in the same order again; fetch the weights anew at their first use."""
        self.key = key
        self._free, self._lent = [*self._free, *reversed(self._lent)], []
        self._weights_checked = False
        if self._fetch_weights() is not self._weights:
            self._bound.clear()  # first, or after an interruption here stale tensors would pass for current
            self._weights = {}  # or a plan that is not used again would keep replaced weights alive

    def new_stream(self) -> PlanStream:
        """A stream with arenas of its own; free ones are lent in the order of the last run."""
        if self._free:
            memory = self._free.pop()
        else:
            graphs, hoisted = None, None
            if self.pool is not None:
                graphs, hoisted = GraphedPrograms(self.pool, measured=self._measured), HoistedMemory()
            memory = _Memory(SlotBuffers(self.plan), graphs, hoisted)
        order = len(self._lent)
        self._lent.append(memory)
        if self.debug:
            with self.launches.turn(memory.tensors):
                memory.buffers.poison_all()
        prologue = None
        if self._prologue is not None:
            prologue = StreamPrologue(
                self._prologue,
                self.bound,
                key=ForecastKey(self.key, order),
                comparable=self._comparable,
                memory=memory.hoisted,
                graphs=memory.graphs,
            )
        return PlanStream(self, memory, prologue)

    def program(self, index: ProgramId) -> Program:
        """A lowered step program."""
        return self.lowered.programs[index]

    def catch_up(self, step: StepIndex) -> tuple[Program, tuple[SlotId, ...]]:
        """The program that computes `step` in full, and the slots it fills."""
        if step not in self._catch_up:
            graph, slots = self.plan.catch_up_graph(step)
            self._catch_up[step] = self.lowered.program(graph), slots
        return self._catch_up[step]

    def bound(self, program: Program | LoweredPart) -> tuple[Any, ...]:
        """The weights and constants of `program`, as the model holds them in this run."""
        if not self._weights_checked or self._fetch_weights() is not self._weights:  # the latter: replaced mid-run
            self._check_weights()
        bound = self._bound.get(program)
        if bound is None:
            bound = self._bound[program] = program.bind(self._weights, self.plan.captured.constants)
        return bound

    def _check_weights(self) -> None:
        """Fetch the weights of this run, and drop the graphs if any have moved.

        Graphs hold the addresses of weights: they see one that was written in place, but not one that was replaced.
        """
        self._weights_checked = True
        weights = self._fetch_weights()
        if weights is not self._weights:
            self._bound.clear()
            self._weights = weights
        if self.pool is None:
            return
        constants = self.plan.captured.constants.values()
        addresses = (
            *(tensor.data_ptr() for tensor in weights.values()),
            # numbers on the CPU are read when a graph is recorded
            *((c.data_ptr(), c._version if c.device.type == "cpu" else 0) for c in constants),
        )
        moved = bool(self._addresses) and addresses != self._addresses
        for graphs in self.graphs:
            graphs.begin_run(moved=moved)
        self._addresses = addresses


@dataclass(frozen=True, eq=False)
class _Memory:
    """What belongs to one stream and outlives it: its slots, the graphs that hold addresses, and what they read."""

    buffers: SlotBuffers
    graphs: GraphedPrograms | None
    hoisted: HoistedMemory | None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that are written again and again, each storage at least once."""
        yield from self.buffers.arenas.values()
        if self.graphs is not None:
            yield from self.graphs.tensors
        if self.hoisted is not None:
            yield from self.hoisted.owned


class PlanStream:
    """A stream that runs step programs on one set of slots and on the values hoisted for them."""

    def __init__(self, runtime: PlanRuntime, memory: _Memory, prologue: StreamPrologue | None) -> None:
        self.runtime = runtime
        self.buffers = memory.buffers
        self.prologue = prologue
        self._memory = memory

    def begin(self) -> None:
        """See `Stream.begin`."""
        if self.prologue is not None:
            self.prologue.begin()

    def end(self) -> None:
        """See `Stream.end`."""
        if self.prologue is not None:
            with self.runtime.launches.turn(self._tensors):
                self.prologue.end()

    def run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        """See `Stream.run`."""
        with self.runtime.launches.turn(self._tensors):
            return self._run(step, call, catch_up=catch_up)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from self._memory.tensors()
        if self.prologue is not None:
            yield from self.prologue.tensors()

    def _run(self, step: StepIndex, call: Call, *, catch_up: bool) -> Any:
        runtime, leaves = self.runtime, call.leaves
        hoisted = self.prologue.at(step, call) if self.prologue is not None else {}
        slots: tuple[list[torch.Tensor], list[torch.Tensor]]
        if catch_up:
            program, filled = runtime.catch_up(step)
            slots = [], [self.buffers.slots[slot] for slot in filled]
        else:
            program, slots = runtime.program(runtime.plan.steps[step].program), self.buffers.steps[step]
        bound = runtime.bound(program)
        if self._memory.graphs is not None and not catch_up:
            outputs = self._memory.graphs.run(runtime.places[step], program, bound, leaves, slots, hoisted)
        else:
            outputs = program(bound, leaves, *slots, [hoisted[name] for name in program.step.hoisted])
        if runtime.debug:
            self.buffers.poison_dead(step)
        return pytree.tree_unflatten(outputs, runtime.plan.captured.out_spec)


def _devices(plan: Plan) -> set[torch.device]:
    """Where the inputs, parameters and slots of a plan lie."""
    values = (node.meta.get("val") for node in plan.captured.graph.nodes if node.op == "placeholder")
    return {*plan.table.arena_bytes, *(value.device for value in values if isinstance(value, torch.Tensor))}


def _on_cpu(plan: Plan) -> bool:
    """Whether all inputs of a call are on the CPU, where the host can read them."""
    captured = plan.captured
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.inputs]
    return all(node.meta["val"].device.type == "cpu" for node in inputs)
