"""Links in the pages lead somewhere, and files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, REPO, anchors, code, links

PACKAGES = ("harmonica_rt", "kernels/harmonica_kernels", "training/harmonica_training", "tests")
# What commands write, and what a reader makes.
ELSEWHERE = {"site/", "every-2.json", "prompts.txt", "schedule.json", "router.pt", "file.txt"}
NAME = re.compile(r"[\w.*-]+(/[\w.*-]+)*(\.(py|md|json|cpp|h|png|txt|toml|yml)|/)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_files_named_in_backticks_exist(page: Path) -> None:
    """Relative to the page, to the repository or to a package; a name without a folder may lie anywhere in one."""
    named = {text.rstrip("/") for text in code(page) if NAME.fullmatch(text) and text not in ELSEWHERE}
    bases = [page.parent, REPO, *(REPO / package for package in PACKAGES)]
    missing = [name for name in named if not any(any(base.glob(name)) for base in bases)]
    anywhere = {path.name for package in PACKAGES for path in (REPO / package).rglob("*.*")}
    assert sorted(name for name in missing if "/" in name or name not in anywhere) == []
