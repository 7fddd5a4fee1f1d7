"""The double of `torch.cuda` finds what is missing: each measure of the runtime is taken away, and a result is wrong.

These tests ask for wrong results and faults. What the same runs give with all measures is in `test_cuda_streams.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from harmonica_rt.errors import RunError
from harmonica_rt.execute import cuda_graphs, graph_replay, hoisted_memory, parameter_binding, static_tensors
from tests.cuda_double import CudaDouble
from tests.cuda_double.streams import DoubleEvent, DoubleStream
from tests.execute.on_streams import Case
from tests.execute.test_cuda_streams import move, run_and_drop, run_with, warm_up_on_one_stream

Remove = Callable[[pytest.MonkeyPatch], None]


def nothing(*_: Any, **__: Any) -> None:
    """In place of something that is taken away."""


def in_turn(case: Case) -> None:
    """Runs on two streams."""
    for request in range(5):
        case.run(on=request % 2)


def moved(case: Case) -> None:
    """The model is moved in mid-run."""
    for _ in range(4):
        case.run(on=0)
    case.got.append(run_with(case, 2, lambda: move(case)))


def autocast(case: Case) -> None:
    """Parameters are cast to half precision, in copies that autocast keeps for the time of a run."""
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            case.run(on=0)
    case.got = [[output.isfinite() for output in outputs] for outputs in case.got]
    case.expected = [[torch.ones_like(output) for output in outputs] for outputs in case.got]


def no_wait_between_turns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DoubleStream, "wait_event", nothing)


def no_event_behind_a_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DoubleEvent, "record", nothing)


def no_record_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "record_stream", nothing)


def no_wait_before_a_warm_up(patch: pytest.MonkeyPatch) -> None:
    _without_every_other_wait(patch, first=True)


def no_wait_behind_a_warm_up(patch: pytest.MonkeyPatch) -> None:
    _without_every_other_wait(patch, first=False)


def _without_every_other_wait(patch: pytest.MonkeyPatch, *, first: bool) -> None:
    wait, left_out = DoubleStream.wait_stream, [first]

    def every_other(stream: DoubleStream, other: DoubleStream) -> None:
        left_out[0] = not left_out[0]
        if left_out[0]:
            wait(stream, other)

    patch.setattr(DoubleStream, "wait_stream", every_other)


def no_copies_of_outputs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph_replay, "copies", lambda outputs: outputs)


def no_static_inputs(patch: pytest.MonkeyPatch) -> None:
    def put(self: static_tensors.StaticLeaves, leaves: Sequence[Any]) -> None:
        for index in (*self._request, *self._changing):
            if self.tensors[index] is None:
                self.tensors[index] = leaves[index]

    patch.setattr(static_tensors.StaticLeaves, "put", put)


def no_rows_of_hoisted_values(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hoisted_memory.StaticRows, "load", nothing)


def no_look_at_addresses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parameter_binding.ParameterBinding, "_check", _bind_without_looking)


def _bind_without_looking(binding: Any) -> None:
    binding._checked, binding._parameters = True, binding._fetch()
    binding._bound.clear()


def casts_that_autocast_keeps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph_replay, "_casting_anew", contextlib.nullcontext)


UNORDERED = "what another stream is not done with"
FREED = "record_stream was not called"


@pytest.mark.parametrize(
    ("remove", "runs", "fault"),
    [
        (no_wait_between_turns, in_turn, UNORDERED),
        (no_event_behind_a_turn, in_turn, UNORDERED),
        (no_record_stream, run_and_drop, FREED),
        (no_record_stream, warm_up_on_one_stream, FREED),
        (no_wait_before_a_warm_up, in_turn, UNORDERED),
        (no_wait_behind_a_warm_up, in_turn, UNORDERED),
        (no_copies_of_outputs, in_turn, None),
        (no_static_inputs, in_turn, None),
        (no_rows_of_hoisted_values, in_turn, None),
        (no_look_at_addresses, moved, "reads memory that was freed"),
        (casts_that_autocast_keeps, autocast, None),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
def test_what_is_taken_away_gives_a_wrong_result(
    cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch, remove: Remove, runs: Callable[[Case], None], fault: str | None
) -> None:
    case = Case(cuda, max_plans=1 if runs is run_and_drop else 8)
    with monkeypatch.context() as patch:
        remove(patch)
        try:
            runs(case)
            right = case.right()
        except RunError:  # the run itself finds its timesteps spoiled
            right = False
            cuda.synchronize()
    faults, cuda.faults[:] = [*cuda.faults], []
    assert not right
    assert fault is None or any(fault in found for found in faults)


def test_workspaces_that_graphs_share_are_noted(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(cuda)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "_own_workspaces", contextlib.nullcontext)
        in_turn(case)
    faults, cuda.faults[:] = [*cuda.faults], []
    assert any("uses a workspace of pool 0" in fault for fault in faults)


def test_casts_under_autocast_are_right_where_graphs_make_them(cuda: CudaDouble) -> None:
    case = Case(cuda)
    autocast(case)
    assert case.right()
