"""`backend="harmonica"` is found through the package's metadata."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

from harmonica_rt.backend import harmonica

REPO = Path(__file__).parents[2]


def test_the_metadata_names_the_backend(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    (written,) = tmp_path.glob("*.egg-info/entry_points.txt")
    _, _, group = written.read_text().partition("[torch_dynamo_backends]\n")
    name, _, value = group.splitlines()[0].partition(" = ")
    assert name == "harmonica"
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is harmonica
