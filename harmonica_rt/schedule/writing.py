"""Writes the files of a schedule with `files`; an error of the file system becomes a ScheduleWriteError."""

from __future__ import annotations

import os

from harmonica_rt.errors import ScheduleWriteError
from harmonica_rt.schedule.files import write_atomically


class _MissingFolderError(ScheduleWriteError, FileNotFoundError):
    """The folder does not exist."""


class _PermissionError(ScheduleWriteError, PermissionError):
    """There is no permission to write the file or into its folder."""


class _IsFolderError(ScheduleWriteError, IsADirectoryError):
    """The path is that of a folder."""


class _NotFolderError(ScheduleWriteError, NotADirectoryError):
    """A part of the path that should be a folder is a file."""


_KINDS: dict[type[OSError], type[ScheduleWriteError]] = {
    FileNotFoundError: _MissingFolderError,
    PermissionError: _PermissionError,
    IsADirectoryError: _IsFolderError,
    NotADirectoryError: _NotFolderError,
}


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of a schedule, completely or not at all.

    Raises:
        ScheduleWriteError: the file cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        kind = _KINDS.get(type(error), ScheduleWriteError)
        raise kind(error.errno, error.strerror or str(error), os.fspath(path)) from error
