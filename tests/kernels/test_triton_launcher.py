"""Triton's launcher against the compiled kernels, over a stub of the driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="compiles a few lines of C")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads the driver itself")
@pytest.mark.parametrize("checks", ["launcher_checks", "ahead_checks"])
def test_launches_fit_their_kernels(checks: str, request: pytest.FixtureRequest) -> None:
    """In a process of its own: the stub takes the place of the driver for good."""
    marks = request.config.getoption("-m")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(HERE / f"{checks}.py")],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
