"""Sweeps in two tiers: `make test` runs a part of them, `make test-all` every member."""

from __future__ import annotations

from typing import Any

import pytest


def member(*values: Any, id: str, always: bool) -> Any:
    """One member of a sweep, for `parametrize`; `make test` runs it only if `always`."""
    return pytest.param(*values, id=id, marks=() if always else (pytest.mark.exhaustive,))
