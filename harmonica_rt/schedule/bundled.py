"""The schedules in the package: the files in `known/`."""

from __future__ import annotations

from importlib import resources

from harmonica_rt.schedule.format import ScheduleFileNotFoundError
from harmonica_rt.untrusted.text import quoted

_FOLDER = "known"


def known_names() -> tuple[str, ...]:
    """Names of the bundled schedules."""
    folder = resources.files("harmonica_rt.schedule") / _FOLDER
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def read_known(name: str) -> bytes:
    """The bytes of a bundled schedule, or ScheduleFileNotFoundError listing the available names."""
    if name not in known_names():
        raise ScheduleFileNotFoundError(f"the package has no schedule {quoted(name)}; it has {list(known_names())}")
    return (resources.files("harmonica_rt.schedule") / _FOLDER / f"{name}.json").read_bytes()
