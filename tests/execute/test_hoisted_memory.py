"""Hoisted values at fixed addresses: what a row and its table hold."""

from __future__ import annotations

import pytest
import torch

from harmonica_rt.execute.hoisted_memory import StaticRows
from harmonica_rt.execute.step_counter import StepCounter
from harmonica_rt.indices import StepIndex


def test_views_of_one_tensor_take_its_bytes_once() -> None:
    whole = torch.randn(4, 6 * 16)
    examples = {f"part{i}": part for i, part in enumerate(whole.chunk(6, dim=1))} | {"other": torch.randn(3).double()}
    rows, counter = StaticRows(examples, steps=3), StepCounter(torch.device("cpu"))
    assert rows.nbytes == 4 * (whole.nbytes + 64)  # a row and a table of three
    steps = {name: torch.stack([value + step for step in range(3)]) for name, value in examples.items()}
    rows.tabulate(list(steps), list(steps.values()))

    def holds(step: int) -> bool:
        counter.set(StepIndex(step))
        rows.load(counter)
        return all(torch.equal(rows.tensors[name], steps[name][step]) for name in steps)

    assert all(map(holds, (2, 0, 1)))
    rows.put({name: steps[name][2] for name in steps})
    rows.keep(StepIndex(1), counter)
    assert holds(0)
    counter.set(StepIndex(1))
    rows.load(counter)
    assert all(torch.equal(rows.tensors[name], steps[name][2]) for name in steps)
    assert all(rows.tensors[name].stride() == value.stride() for name, value in examples.items())


@pytest.mark.parametrize("layout", ["as in the row", "one elsewhere", "steps within rows", "other strides"])
def test_views_of_one_tensor_are_tabulated_as_they_lie(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(3, 4, 6 * 16)
    names = [f"part{index}" for index in range(6)]
    rows = StaticRows(dict(zip(names, whole[0].chunk(6, dim=1), strict=True)), steps=3)
    if layout == "steps within rows":
        whole = whole.transpose(0, 1).contiguous().transpose(0, 1)  # as a batched operator may lay them out
    parts = list(whole.chunk(6, dim=-1))
    if layout == "one elsewhere":
        parts[2] = parts[2].clone()
    if layout == "other strides":
        parts[3] = parts[3].transpose(1, 2).contiguous().transpose(1, 2)
    together: list[int] = []
    tabulate = StaticRows._tabulate_together
    monkeypatch.setattr(
        StaticRows, "_tabulate_together", lambda self, group: together.append(len(group)) or tabulate(self, group)
    )
    rows.tabulate(names, parts)
    assert together == ([6] if layout == "as in the row" else [])
    counter = StepCounter(torch.device("cpu"))
    for step in range(3):
        counter.set(StepIndex(step))
        rows.load(counter)
        assert all(torch.equal(rows.tensors[name], part[step]) for name, part in zip(names, parts, strict=True))
