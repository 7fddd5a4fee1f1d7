"""Of two programs of one step, the one whose graph is faster stays. Graphs are bodies that are called again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.execute.cuda_graphs import Body, Graph, Graphs
from harmonica_rt.execute.graph_replay import ROUNDS
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.lower.faster_of_two import Faster
from harmonica_rt.options import CompileOptions
from harmonica_rt.schedule import Schedule
from tests.models import stack, stack_call

STEPS = 6
PROLOGUES = 1  # recorded before the first step program: of a step without a forecast


class Recorded:
    """A graph that calls its body."""

    def __init__(self, body: Body) -> None:
        self.replay = body


class Pool:
    """Records by keeping the body.

    Args:
        seconds: of each measurement, in turn.
        refused: numbers of the recordings that fail.
    """

    nbytes = 0
    device = torch.device("cpu")

    def __init__(self, seconds: list[float], refused: tuple[int, ...] = ()) -> None:
        self._seconds = seconds
        self._refused = refused
        self.recordings = 0

    def warm_up(self, body: Body) -> tuple[Any, ...]:
        return body()

    def record(self, body: Body) -> Graph:
        self.recordings += 1
        if self.recordings in self._refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Recorded(body)

    def seconds(self, run: Callable[[], object]) -> float:
        run()
        return self._seconds.pop(0)


def chosen(pool: Pool) -> Faster:
    """The program of a compiled model after two runs, which must equal the reference."""
    model = stack()
    schedule = Schedule.all_compute(steps=STEPS, sites=hrt.find_sites(model))
    options = CompileOptions(lowering="inductor", strict=True)
    engine = PlannedEngine(model, schedule, options, Graphs(lambda _: pool, measured=False))
    compiled = CompiledModel(model, schedule, engine, verify=False)
    truth = hrt.reference(model, schedule)
    for _ in range(2):
        compiled.reset(), truth.reset()
        for step in range(STEPS):
            torch.testing.assert_close(compiled(**stack_call(step)), truth(**stack_call(step)))
    (runtime,) = compiled.plans.values()
    assert not runtime.arenas.graphs[0].refusals
    (program,) = runtime.lowered.lowering.programs
    assert isinstance(program, Faster)
    return program


@pytest.mark.parametrize(("regions", "whole"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_faster_graph_decides(regions: float, whole: float) -> None:
    program = chosen(Pool([regions] * ROUNDS + [whole] * ROUNDS))
    assert program.seconds == (regions, whole)
    assert program.chosen is (program.first if regions < whole else program.second)


def test_a_program_that_cannot_be_recorded_is_not_chosen() -> None:
    program = chosen(Pool([1.0] * ROUNDS, refused=(PROLOGUES + 1,)))
    assert program.chosen is program.second
