"""Times of calls hold the device's work, all of it and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from harmonica_rt.demo import measure


class Device:
    """A clock that stands still while work is asked for, and runs while somebody waits for it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.asked = 0.0
        self.waited_for: list[Any] = []

    def synchronize(self, device: Any) -> None:
        self.waited_for.append(device)
        self.seconds += self.asked
        self.asked = 0.0

    def work(self, seconds: float) -> None:
        self.asked += seconds


class Slow(nn.Module):
    """A model whose call takes three seconds of the device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def forward(self) -> None:
        self.device.work(3.0)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: device.seconds))
    return device


def test_a_call_on_cuda_takes_what_the_device_takes_for_it(device: Device) -> None:
    model = Slow(device)
    place = torch.device("cuda", 1)
    with measure._call_times(model, place) as calls:
        device.work(100.0)  # another's, asked for before
        model()
        model()
    assert calls == [3.0, 3.0]
    assert set(device.waited_for) == {place}


def test_on_cpu_nobody_waits_for_cuda(device: Device) -> None:
    model = nn.Linear(2, 2)
    measure._run(model, lambda: model(torch.ones(2)))
    assert device.waited_for == []
