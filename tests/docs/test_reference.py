"""Every public name has an entry in the reference, and every entry names something that exists."""

from __future__ import annotations

import importlib
import re
import runpy

import pytest

import harmonica_kernels
import harmonica_rt
import harmonica_rt.errors
import harmonica_rt.schedule
import harmonica_training
import harmonica_training.baselines
from harmonica_rt.cli import app
from tests.docs.markdown import REPO

REFERENCE = REPO / "docs" / "reference"
ENTRIES = sorted(
    entry
    for page in REFERENCE.glob("*.md")
    for entry in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
)


def value(path: str) -> object:
    """The object with a dotted path, whose module is as long as can be imported."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_no_name_has_two_entries() -> None:
    assert len(ENTRIES) == len(set(ENTRIES))


@pytest.mark.parametrize(
    "package",
    [harmonica_rt, harmonica_rt.schedule, harmonica_training, harmonica_training.baselines, harmonica_kernels],
    ids=lambda package: package.__name__,
)
def test_every_public_name_has_an_entry(package: object) -> None:
    described = [value(entry) for entry in ENTRIES]
    names = [name for name in package.__all__ if name != "__version__"]  # type: ignore[attr-defined]
    missing = [name for name in names if not any(getattr(package, name) is one for one in described)]
    assert missing == []


def test_every_error_of_the_runtime_has_an_entry() -> None:
    described = [value(entry) for entry in ENTRIES]
    module = harmonica_rt.errors
    errors = [name for name, one in vars(module).items() if isinstance(one, type) and one.__module__ == module.__name__]
    assert [name for name in errors if not any(getattr(module, name) is one for one in described)] == []


def test_the_version_is_mentioned() -> None:
    assert "`hrt.__version__`" in (REFERENCE / "runtime.md").read_text("utf-8")


def test_the_page_of_the_command_line_has_every_command() -> None:
    page = runpy.run_path(str(REPO / "docs" / "site_pages.py"))["cli_page"]()
    groups = [("", app), *((f"{group.name} ", group.typer_instance) for group in app.registered_groups)]
    commands = [
        prefix + (command.name or command.callback.__name__)
        for prefix, group in groups
        if group is not None
        for command in group.registered_commands
        if command.callback is not None
    ]
    assert commands
    assert [name for name in commands if f" `harmonica-rt {name}`\n" not in page] == []


def test_every_page_of_the_reference_is_in_the_navigation() -> None:
    navigation = (REPO / "mkdocs.yml").read_text("utf-8")
    pages = sorted(path.relative_to(REPO / "docs").as_posix() for path in (REPO / "docs").rglob("*.md"))
    assert [page for page in pages if f": {page}\n" not in navigation] == []
