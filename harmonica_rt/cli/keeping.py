"""Keeps the schedule that a training has learned, even if its file cannot be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from harmonica_rt.errors import HarmonicaError

if TYPE_CHECKING:
    from harmonica_rt.schedule import Schedule


def save_anywhere(schedule: Schedule, out: Path, work: Path | None) -> None:
    """Write the schedule to `out`, or elsewhere if that fails, so that a training is not lost.

    Raises:
        HarmonicaError: it was written elsewhere; the message says where.
        OSError: it cannot be written anywhere.
    """
    try:
        schedule.save(out)
    except OSError as error:
        kept = _saved_elsewhere(schedule, f"{out.stem}-{os.getpid()}.json", work)
        if kept is None:
            raise
        raise HarmonicaError(f"{out}: {error.strerror or error}; the schedule is in {kept}") from error


def _saved_elsewhere(schedule: Schedule, name: str, work: Path | None) -> Path | None:
    """The first of several places where the schedule could be written; None if there was none."""
    for folder in (work, Path.cwd(), Path(tempfile.gettempdir())):
        if folder is not None:
            with contextlib.suppress(OSError):
                schedule.save(folder / name)
                return folder / name
    return None
