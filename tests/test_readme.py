"""What the README says is true: its snippet runs from any folder, and its links lead somewhere from a package index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text("utf-8")


def test_the_snippet_runs_from_any_folder(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = os.pathsep.join([str(REPO), str(REPO / "kernels"), str(REPO / "training")])
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # other tests have the other cores
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "parity ok" in done.stdout
    assert not list(tmp_path.iterdir())


def test_links_lead_to_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("https:") and not (REPO / link).is_file()] == []
