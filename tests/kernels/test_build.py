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
# torch is imported once; a copy of the package comes first on the path, before an installed one
FORKS = f"""import os, sys, torch
for folder in sys.argv[1:]:
    if not (child := os.fork()):
        os.dup2(os.open(folder + "/stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.path.insert(0, folder)
        exec({USE!r})
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(open(folder + "/stderr").read())
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


BUILDS: dict[str, tuple[dict[str, str] | None, bytes | None]] = {
    "other torch": ({"torch": "1.0.0", "compiler": "cc", "library": "_C.so"}, b""),
    "does not load": ({"torch": torch.__version__, "compiler": "cc", "library": "_C.so"}, b"not a library"),
    "absent": (None, None),
    "by choice": ({"reason": "HARMONICA_BUILD_CSRC=0", "chosen": "yes"}, None),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stderr of processes that use a copy of the package with the record and the library of each of `BUILDS`."""
    folders = []
    for record, library in BUILDS.values():
        folders.append(tmp_path_factory.mktemp("build"))
        copy = folders[-1] / "harmonica_kernels"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
        if record is not None:
            (copy / "_C.build.json").write_text(json.dumps(record))
        if library is not None:
            (copy / "_C.so").write_bytes(library)
    done = subprocess.run([sys.executable, "-c", FORKS, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (folder / "stderr").read_text() for name, folder in zip(BUILDS, folders, strict=True)}


def test_other_torch_is_said_once(said: dict[str, str]) -> None:
    assert "built against torch 1.0.0, but this is torch" in said["other torch"]
    assert said["other torch"].count("RuntimeWarning: the C++ extension of harmonica_kernels is not used") == 1


def test_library_that_does_not_load_is_said(said: dict[str, str]) -> None:
    assert "_C.so, built against torch" in said["does not load"]
    assert "does not load here" in said["does not load"]


def test_absent_extension_is_said_when_the_cpu_is_used(said: dict[str, str]) -> None:
    assert said["absent"].count("RuntimeWarning") == 1
    assert "was never built" in said["absent"]


def test_extension_left_out_by_choice_is_quiet(said: dict[str, str]) -> None:
    assert said["by choice"] == ""
