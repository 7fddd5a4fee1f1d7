"""The CUDA branch without a GPU: in a process of its own, since the guard that it needs stays for good."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="compiles a few lines of C++")
@pytest.mark.parametrize("tests", ["families", "classes", "inductor"])
def test_on_fake_cuda(tests: str, request: pytest.FixtureRequest) -> None:
    marks = request.config.getoption("-m")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(HERE / f"on_{tests}.py")],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
