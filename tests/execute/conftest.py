"""Fixtures of the runtime's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_double import CudaDouble, in_place_of_cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDouble]:
    """The double of `torch.cuda`, in its place."""
    with in_place_of_cuda(monkeypatch) as double:
        yield double
