"""Writes files completely or not at all, with errors that name the file. Training and plan files use it as well."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never a partial one.

    A symbolic link is kept, and its target is written. A device or a pipe is written to directly.

    Args:
        path: the file.
        data: the contents; text is written as UTF-8.

    Raises:
        OSError: the file cannot be written. The error names `path`, and nothing new is left beside it.
    """
    contents = data.encode("utf-8") if isinstance(data, str) else data
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_bytes(contents)
        else:
            _replace(os.path.realpath(path), contents)
    except OSError as error:  # a full disk is reported without a name, other failures with a temporary one
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _replace(target: str, contents: bytes) -> None:
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            Path(temporary).unlink(missing_ok=True)


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float | None = None) -> None:
    """Write a matplotlib figure in the format given by the suffix of `path`; without one, PNG with `.png` appended.

    Raises:
        ValueError: matplotlib cannot write this format.
        OSError: see `write_atomically`.
    """
    name = os.fspath(path)
    ending = Path(name).suffix.removeprefix(".").lower()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending or "png", dpi=dpi or figure.get_dpi())
    write_atomically(name if ending else f"{name.removesuffix('.')}.png", buffer.getvalue())
