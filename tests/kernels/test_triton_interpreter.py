"""The Triton kernels on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

COMPARISONS = [Path(__file__).with_name(name) for name in ("triton_comparisons.py", "triton_weights.py")]


def test_kernels_equal_references() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET once, when a kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, COMPARISONS)],
        capture_output=True,
        text=True,
        cwd=COMPARISONS[0].parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
