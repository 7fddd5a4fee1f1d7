"""A truth that is one precision up throughout, whatever a model's code says."""

from __future__ import annotations

import torch

from harmonica_rt.parity.promoted import Promoted


def test_dtypes_named_in_code_are_raised() -> None:
    x = torch.randn(4, dtype=torch.float64)
    with Promoted(torch.float32, torch.float64):
        found = [
            x.float(),
            torch.arange(4, dtype=torch.float32) + x,
            torch.ones(4),
            x.to(torch.float32).exp(),
            torch.view_as_real(torch.polar(torch.ones(4), x.float())),
        ]
    assert all(each.dtype is torch.float64 for each in found)
    assert torch.equal(found[0], x)
    assert torch.equal(found[3], x.exp())


def test_other_dtypes_are_left_alone() -> None:
    with Promoted(torch.bfloat16, torch.float32):
        assert torch.ones(2, dtype=torch.bfloat16).dtype is torch.float32
        assert torch.ones(2, dtype=torch.float64).dtype is torch.float64
        assert torch.arange(3).dtype is torch.int64


def test_what_is_written_in_place_is_written() -> None:
    x = torch.zeros(3, dtype=torch.float32)
    with Promoted(torch.float32, torch.float64):
        x.add_(torch.ones(3))
    assert x.tolist() == [1.0, 1.0, 1.0]
