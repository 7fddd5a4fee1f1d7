"""Links of pages, rewritten for the site."""

from __future__ import annotations

import runpy

import pytest

from tests.docs.markdown import REPO

SITE_PAGES = runpy.run_path(str(REPO / "docs" / "site_pages.py"))


@pytest.mark.parametrize(
    ("folder", "link", "expected"),
    [
        ("", "docs/zoo.md", "zoo.md"),
        ("", "docs/errors.md#files", "errors.md#files"),
        ("", "CONTRIBUTING.md", "contributing.md"),
        ("", "csrc/element.h", "https://host/owner/name/blob/main/csrc/element.h"),
        ("docs", "zoo.md", "zoo.md"),
        ("docs", "../README.md", "index.md"),
        ("docs", "../benchmarks/results/zoo.json", "https://host/owner/name/blob/main/benchmarks/results/zoo.json"),
        ("docs/reference", "../errors.md#files", "../errors.md#files"),
        ("docs/reference", "../../CHANGELOG.md", "../changes.md"),
        ("docs", "#files", "#files"),
        ("docs", "https://host/else", "https://host/else"),
    ],
)
def test_links_lead_to_a_page_of_the_site_or_to_the_repository(folder: str, link: str, expected: str) -> None:
    text = SITE_PAGES["rewritten"](f"see [it]({link}).", folder, "https://host/owner/name")
    assert text == f"see [it]({expected})."
