"""Links, headings and code of the repository's Markdown pages, read without a Markdown library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")]
PAGES += sorted((REPO / "docs").rglob("*.md"))


def prose(page: Path) -> str:
    """The text of a page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of each relative link; an empty path is the page itself."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as git hosts and MkDocs both make them from plain words."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def code(page: Path) -> Iterator[str]:
    """Each piece of text in backticks."""
    yield from re.findall(r"`([^`\n]+)`", prose(page))
