"""Every test here compiles anew, with the backend registered where the package is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch._dynamo as dynamo
from torch._dynamo.utils import counters

from harmonica_rt.backend import harmonica


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    if "harmonica" not in dynamo.list_backends():
        dynamo.register_backend(harmonica, name="harmonica")
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()
