"""The CUDA branch without a GPU: in a process of its own, since the guard that it needs stays for good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.forked import pass_in_a_process

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="compiles a few lines of C++")
@pytest.mark.parametrize("tests", ["families", "classes", "inductor"])
def test_on_fake_cuda(tests: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    marks = request.config.getoption("-m")
    pass_in_a_process(HERE / f"on_{tests}.py", tmp_path, marks, CUDA_VISIBLE_DEVICES="")
