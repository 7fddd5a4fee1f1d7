"""Compiles and loads `guard.cpp`, which lets a torch without CUDA work on fake tensors that lie on `cuda:0`.

Hazard: the guard stays for the rest of the process, so only processes of their own load it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")
FOLDER = Path(__file__).parents[2] / "build" / "fake_cuda"


def load() -> None:
    """Register the guard. A torch that was built with CUDA has its own, which is left in place."""
    if torch.version.cuda is None:
        ctypes.CDLL(str(_built()))


def _built() -> Path:
    """The compiled guard for this release of torch, made once (some seconds) and kept in `build/`."""
    torch_folder = Path(torch.__file__).parent
    key = hashlib.sha256(f"{torch.__version__} {torch_folder} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    library = FOLDER / f"guard-{key}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            unfinished = Path(scratch) / library.name
            paths = ("-I", torch_folder / "include", "-L", torch_folder / "lib")
            command = (
                os.environ.get("CXX", "g++"),
                "-std=c++20",
                "-shared",
                "-fPIC",
                *paths,
                SOURCE,
                "-lc10",
                "-ltorch_cpu",
            )
            subprocess.run([*map(str, command), "-o", str(unfinished)], check=True, capture_output=True, text=True)
            unfinished.replace(library)  # whole or not at all: other processes build it at the same time
    return library
