"""What goes into the wheel and the sdist, and what they say of themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from harmonica_kernels._build import rebuild_command

REPO = Path(__file__).parent.parent
STALE = "stale.py"
EXTENSION = "kernels/harmonica_kernels/_C.so"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and an sdist of a copy of the source in which an earlier build left files."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    outputs = ("build", "dist", "site", "*.egg-info", "__pycache__", "*.so", "_C.build.json")
    ignored = shutil.ignore_patterns(".*", *outputs)
    shutil.copytree(REPO, source, ignore=ignored)
    left = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "harmonica_rt"
    left.mkdir(parents=True)
    (left / STALE).write_text("")
    (source / EXTENSION).write_text("")  # of an editable install
    code = "from setuptools import build_meta as b; b.build_wheel('../out'); b.build_sdist('../out')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "HARMONICA_BUILD_CSRC": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (source / EXTENSION).exists()
    return folder / "out"


def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(built: Path) -> Message:
    with wheel(built) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_has_what_is_needed_and_nothing_that_is_stale(built: Path) -> None:
    with wheel(built) as archive:
        names = archive.namelist()
    ours = [path for path in (REPO / "harmonica_rt").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert not {str(path.relative_to(REPO)) for path in ours} - set(names)
    for package in ("harmonica_rt", "harmonica_kernels", "harmonica_training"):
        assert f"{package}/py.typed" in names
    wrong = [name for name in names if STALE in name or name.startswith(("tests", "benchmarks"))]
    assert wrong == []
    assert "harmonica_kernels/_C.so" not in names


def test_the_sdist_can_be_built_and_tested(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("no git repository: what belongs to the source is not known")
    assert sorted(set(tracked.stdout.split()) - names) == [".ci/run", ".gitignore"]
    assert not [name for name in names if STALE in name or name.endswith((".so", "_C.build.json"))]


def test_metadata(built: Path) -> None:
    said = metadata(built)
    assert said["Author"] == "harmonica-rt developers"
    assert said["Home-page"].startswith("https://")
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert "models" in said.get_all("Provides-Extra", [])
    text = str(said.get_payload())
    assert "](https://" in text
    assert re.findall(r"\]\((?!https:)", text) == []


def test_everything_names_the_same_oldest_python(built: Path) -> None:
    said = metadata(built)
    required = str(said["Requires-Python"])
    assert re.fullmatch(r">=3\.\d+", required)
    floor = required.removeprefix(">=")
    minor = int(floor.partition(".")[2])
    versions = [line.rpartition(" ")[2] for line in said.get_all("Classifier", []) if "Python :: 3." in line]
    assert min(int(version.partition(".")[2]) for version in versions) == minor
    tools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py3{minor}"
    assert tools["mypy"]["python_version"] == floor
    makefile = (REPO / "Makefile").read_text()
    assert f"sys.version_info < (3, {minor})" in makefile
    assert f"make needs Python {floor} or newer" in makefile
    assert f"Python {floor} or newer" in (REPO / "README.md").read_text()
    assert f"Python {floor}." in (REPO / "constraints.txt").read_text().partition("\n")[0]


def test_the_rebuild_command_names_a_source_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmonica_kernels import _build

    editable = rebuild_command(None)
    assert editable.startswith(f"{sys.executable} -m pip install --force-reinstall --no-deps")
    assert editable.endswith(f"--editable {REPO}")
    monkeypatch.setattr(_build, "_FOLDER", tmp_path / "site-packages" / "harmonica_kernels")
    assert rebuild_command(str(REPO)).endswith(f" {REPO}")
    assert "--editable" not in rebuild_command(str(REPO))
    assert rebuild_command(str(tmp_path)).endswith(" git+https://github.com/harmonica-rt/harmonica-rt")
    monkeypatch.setattr(_build, "_setuptools", lambda: 76)
    assert "--no-build-isolation" not in rebuild_command(str(REPO))
