"""Triton's launcher against the compiled kernels, over a stub of the driver."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.forked import pass_in_a_process

pytest.importorskip("triton", reason="the kernels are written in Triton")

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="compiles a few lines of C")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads the driver itself")
@pytest.mark.parametrize("checks", ["launcher_checks", "ahead_checks"])
def test_launches_fit_their_kernels(checks: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """In a process of its own: the stub takes the place of the driver for good."""
    pass_in_a_process(HERE / f"{checks}.py", tmp_path, request.config.getoption("-m"), TRITON_INTERPRET="0")
