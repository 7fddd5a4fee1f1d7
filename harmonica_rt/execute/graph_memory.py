"""What the graphs of one stream read and write, at addresses that outlive the stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import torch

from harmonica_rt.execute.cuda_graphs import Pool
from harmonica_rt.execute.forecast import TimestepLog
from harmonica_rt.execute.graph_replay import GraphedPrograms
from harmonica_rt.execute.hoisted_memory import HoistedMemory, StaticRows
from harmonica_rt.execute.lowered_plan import LoweredPlan
from harmonica_rt.execute.sampler_state import SamplerState
from harmonica_rt.execute.static_tensors import StaticLeaves, StaticTensors
from harmonica_rt.execute.step_counter import StepCounter


class GraphMemory:
    """The graphs of one stream, and everything at fixed addresses but its slots.

    Args:
        lowered: the plan.
        pool: records the graphs.
        measured: see `GraphedPrograms`.

    Attributes:
        graphs: the graphs.
        leaves: the tensors of the current call.
        foreseen: the timesteps of all steps, where they are foreseen.
        hoisted: the values that the prologue computes.
        weights: the weights of the current step; None where no site is weighted.
        counter: the current step.
        log: the timesteps of the run so far.
        allocated: what has run once, so that it now finds all its memory allocated.
        samplers: what runs compute between the steps, by kind of sampler, the most recently used last.
    """

    def __init__(self, lowered: LoweredPlan, pool: Pool, *, measured: bool) -> None:
        steps = len(lowered.plan.steps)
        self.graphs = GraphedPrograms(pool, measured=measured)
        self.leaves = StaticLeaves(sorted(set(lowered.plan.captured.inputs.values())), lowered.roles)
        self.foreseen = StaticTensors()
        self.hoisted = HoistedMemory(steps)
        self.weights = _weight_rows(lowered.weights)
        self.counter = StepCounter(pool.device)
        self.log = TimestepLog(steps)
        self.allocated: set[Hashable] = set()
        self.samplers: dict[Hashable, SamplerState] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds; the pool of the graphs counts its own."""
        of_samplers = (tensor for state in self.samplers.values() for tensor in state.tensors)
        small = sum(tensor.nbytes for tensor in (self.counter.tensor, *(self.log.rows or ()), *of_samplers))
        weights = self.weights.nbytes if self.weights is not None else 0
        return self.leaves.nbytes + self.foreseen.nbytes + self.hoisted.nbytes + weights + small

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors, each storage at least once."""
        yield from self.leaves.held
        yield from self.foreseen.tensors.values()
        yield from self.hoisted.owned
        if self.weights is not None:
            yield from self.weights.owned
        yield self.counter.tensor
        yield from self.log.rows or ()
        for state in self.samplers.values():
            yield from state.tensors


def _weight_rows(tables: Mapping[str, torch.Tensor]) -> StaticRows | None:
    if not tables:
        return None
    rows = StaticRows({name: table[0] for name, table in tables.items()}, len(next(iter(tables.values()))))
    rows.tabulate(list(tables), list(tables.values()))
    return rows
