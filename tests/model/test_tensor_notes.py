"""Versions and addresses of tensors: the extension and the Python that stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import swap_tensors

from harmonica_rt.model import tensors
from harmonica_rt.model.tensors import TensorNote


@pytest.fixture(params=["extension", "python"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(tensors, "_read_versions", tensors._versions_of)
        monkeypatch.setattr(tensors, "_read_addresses", tensors._addresses_of)
    elif tensors._read_versions is tensors._versions_of:
        pytest.skip("needs the C++ extension")


def several() -> list[torch.Tensor]:
    whole = torch.zeros(4, 4)
    parameter, buffer = nn.Parameter(torch.zeros(3)), nn.Buffer(torch.zeros(2, 3))
    with torch.inference_mode():
        inference = torch.zeros(2)
    return [parameter, buffer, whole, whole[1:], torch.empty(0), torch.zeros(2, device="meta"), inference]


def write_in_place(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


def write_to_a_view(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.view(-1)[:1].zero_()


def replace_data(t: torch.Tensor) -> None:
    t.data = t.detach().clone()


def swap(t: torch.Tensor) -> None:
    swap_tensors(t, nn.Parameter(t.detach().clone()))


@pytest.mark.parametrize("change", [write_in_place, write_to_a_view, replace_data, swap])
def test_a_change_is_seen(change: Callable[[torch.Tensor], None]) -> None:
    given = several()
    note = TensorNote(given)
    assert note.hold()
    assert note.hold()
    change(given[0])
    assert not note.hold()
    assert TensorNote(given).hold()


def test_what_moved_is_told_from_what_was_written() -> None:
    given = several()
    before = TensorNote(given)
    replace_data(given[0])
    moved = TensorNote(given)
    assert moved.has_moved_since(before)
    write_in_place(given[0])
    written = TensorNote(given)
    assert not written.has_moved_since(moved)
    assert not written.same_as(moved)
    assert written.same_as(TensorNote(given))


def test_the_numbers_are_those_of_torch() -> None:
    given = [t for t in several() if not t.is_inference()]
    write_in_place(given[2])
    assert tensors._read_versions(given, torch.Tensor) == tensors._versions_of(given, torch.Tensor)
    assert tensors._read_addresses(given, torch.Tensor) == tensors._addresses_of(given, torch.Tensor)
    assert tensors._read_versions([], torch.Tensor) == b""


def test_what_has_no_version_or_address_is_an_error() -> None:
    *_, inference = several()
    with pytest.raises(RuntimeError, match="version"):
        tensors._read_versions([inference], torch.Tensor)
    sparse: Any = torch.zeros(2).to_sparse()
    with pytest.raises(RuntimeError, match="storage"):
        tensors._read_addresses([sparse], torch.Tensor)


def test_other_objects_are_refused() -> None:
    for read in (tensors._read_versions, tensors._read_addresses):
        for wrong in ([object()], [torch.zeros(1), None]):
            with pytest.raises((TypeError, AttributeError)):
                read(wrong, torch.Tensor)
