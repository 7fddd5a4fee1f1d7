"""Of two programs of one step, the one whose graph is faster stays."""

from __future__ import annotations

import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.api import CompiledModel
from harmonica_rt.execute.graph_replay import ROUNDS
from harmonica_rt.execute.planned_engine import PlannedEngine
from harmonica_rt.lower.faster_of_two import Faster
from harmonica_rt.options import CompileOptions
from harmonica_rt.schedule import Schedule
from tests.models import stack, stack_call
from tests.plain_pool import PlainPool

STEPS = 6
PROLOGUES = 1  # recorded before the first step program: of a step without a forecast


def chosen(pool: PlainPool) -> Faster:
    """The program of a compiled model after two runs, which must equal the reference."""
    model = stack()
    schedule = Schedule.all_compute(steps=STEPS, sites=hrt.find_sites(model))
    options = CompileOptions(lowering="inductor", strict=True)
    engine = PlannedEngine(model, schedule, options, pool.graphs)
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
    program = chosen(PlainPool([regions] * ROUNDS + [whole] * ROUNDS))
    assert program.seconds == (regions, whole)
    assert program.chosen is (program.first if regions < whole else program.second)


def test_a_program_that_cannot_be_recorded_is_not_chosen() -> None:
    program = chosen(PlainPool([1.0] * ROUNDS, refused=(PROLOGUES + 1,)))
    assert program.chosen is program.second
