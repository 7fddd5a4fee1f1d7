"""Plan files that someone changed and gave a digest that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harmonica_rt.planfile.file import contents_digest


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the document in a file, and its digest with it."""
    document = json.loads(path.read_text())
    change(document)
    document["digest"] = contents_digest(document)
    path.write_text(json.dumps(document))


def nodes(document: dict[str, Any]) -> list[Any]:
    """The nodes of the first plan's graph."""
    found: list[Any] = document["plans"][0]["graph"]["nodes"]
    return found


def first(document: dict[str, Any], operator: str) -> Any:
    """The first node that calls `operator`."""
    return next(node for node in nodes(document) if node.get("call") == operator)
