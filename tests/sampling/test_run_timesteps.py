"""Which step a scheduler was stepped with, told by value and, where a look would wait, by address."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from harmonica_rt.sampling.run_timesteps import RunTimesteps
from tests.waiting import no_waiting

VALUES = torch.tensor([900, 900, 500, 100])  # Heun repeats some


@pytest.fixture
def timesteps() -> RunTimesteps:
    found = RunTimesteps.of(SimpleNamespace(timesteps=VALUES.clone()))
    assert found is not None
    return found


@pytest.mark.parametrize(("timestep", "wrong"), [(500, False), (100, True), (torch.tensor(100), True), (77, False)])
def test_by_value(timesteps: RunTimesteps, timestep: object, wrong: bool) -> None:
    assert timesteps.belongs_to_another(timestep, 2) is wrong


def test_by_address(timesteps: RunTimesteps) -> None:
    assert [timesteps.position(t) for t in timesteps.own] == [0, 1, 2, 3]
    assert [timesteps.position(t) for t in timesteps.own[1:]] == [1, 2, 3]
    assert timesteps.position(timesteps.own[2].clone()) is None
    assert timesteps.position(timesteps.own.float()[2]) is None


def test_strided_and_empty_schedules() -> None:
    strided = RunTimesteps.of(SimpleNamespace(timesteps=torch.arange(8)[1::2]))
    assert strided is not None
    assert [strided.position(t) for t in strided.own] == [0, 1, 2, 3]
    assert RunTimesteps.of(SimpleNamespace(timesteps=[3, 2, 1])) is None
    assert RunTimesteps.of(SimpleNamespace()) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("element", "wrong"), [(0, False), (1, False), (2, True)])
def test_on_a_gpu_no_one_waits(element: int, wrong: bool) -> None:
    own = VALUES.cuda()
    timesteps = RunTimesteps(own, VALUES)
    with torch.cuda.device(own.device), no_waiting():
        assert timesteps.belongs_to_another(own[element], 1) is wrong
