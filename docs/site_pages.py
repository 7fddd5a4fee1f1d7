"""MkDocs hook: the pages of the site that are not files in docs/, and the links that leave docs/.

The README, CONTRIBUTING.md and CHANGELOG.md become pages, so that their text is written once. The page of the command
line is generated from the commands themselves. Links are written for a git host, relative to the file they stand in;
here they are rewritten to lead to a page of the site, or to the repository if the site has no such page.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
CLI = "reference/cli.md"


def cli_page() -> str:
    """The commands with their arguments and options, as Markdown; one heading per command."""
    command = [sys.executable, "-m", "typer", "harmonica_rt.cli", "utils", "docs"]
    command += ["--name", "harmonica-rt", "--title", "Command line"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n?", "", text)  # the headings say the same, without cutting it off


def rewritten(text: str, folder: str, repository: str) -> str:
    """Text of a Markdown file whose links lead somewhere from a page of the site.

    Args:
        text: the file's text.
        folder: folder of the file within the repository: `docs` for pages, empty for files of the root.
        repository: address of the repository.
    """

    def link(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            return f"]({posixpath.relpath(PAGES[path], posixpath.relpath(folder or 'docs', 'docs'))}{anchor})"
        if path.startswith("docs/"):
            return f"]({posixpath.relpath(path, folder or 'docs')}{anchor})"
        return f"]({repository}/blob/main/{path}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", link, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = rewritten((ROOT / source).read_text("utf-8"), "", config.repo_url)
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, CLI, content=cli_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of a page that is a file in docs/."""
    if page.file.generated_by is not None:
        return markdown
    folder = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri)))
    return rewritten(markdown, folder, config.repo_url)
