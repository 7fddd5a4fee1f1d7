"""What the build leaves behind, and what is said when it does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import harmonica_kernels
from harmonica_kernels._build import same_abi

PACKAGE = Path(harmonica_kernels.__file__).parent
USE = """import torch, harmonica_kernels as k
x = torch.ones(3)
for _ in range(2):
    k.gated_residual(x, x)
    k.residual_reuse(x, [x], [None])
    k.residual_reuse_norm_modulate(x, [x], [None])
"""


@pytest.mark.parametrize(
    ("built", "running", "same"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0+cpu", "2.13.1+cu130", True),
        ("2.1.0", "2.13.0", False),
        ("2.13.0", "2.14.0", False),
    ],
)
def test_same_abi(built: str, running: str, same: bool) -> None:
    assert same_abi(built, running) is same


def use_copy(folder: Path, record: dict[str, str] | None, library: bytes | None = None) -> str:
    """Stderr of a process that uses a copy of the package with this record and library."""
    copy = folder / "harmonica_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if record is not None:
        (copy / "_C.build.json").write_text(json.dumps(record))
    if library is not None:
        (copy / "_C.so").write_bytes(library)
    # cwd comes first on the path of `python -c`: before an installed package
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_other_torch_is_said_once(tmp_path: Path) -> None:
    said = use_copy(tmp_path, {"torch": "1.0.0", "compiler": "cc", "library": "_C.so"}, b"")
    assert "built against torch 1.0.0, but this is torch" in said
    assert said.count("RuntimeWarning: the C++ extension of harmonica_kernels is not used") == 1


def test_library_that_does_not_load_is_said(tmp_path: Path) -> None:
    said = use_copy(tmp_path, {"torch": torch.__version__, "compiler": "cc", "library": "_C.so"}, b"not a library")
    assert "_C.so, built against torch" in said
    assert "does not load here" in said


def test_absent_extension_is_said_when_the_cpu_is_used(tmp_path: Path) -> None:
    said = use_copy(tmp_path, None)
    assert said.count("RuntimeWarning") == 1
    assert "was never built" in said


def test_extension_left_out_by_choice_is_quiet(tmp_path: Path) -> None:
    assert use_copy(tmp_path, {"reason": "HARMONICA_BUILD_CSRC=0", "chosen": "yes"}) == ""
