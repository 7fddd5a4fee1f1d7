"""Schedules of the same sites for several numbers of steps, and their file.

Hazard: a schedule for another number of steps than a run has is only as good as its resampling. So a set says for each
number of steps which of its schedules is taken, and a resampled one says in `made_by` what it was made from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import format
from harmonica_rt.schedule.checks import check_sequence
from harmonica_rt.schedule.exchanged import FilePath
from harmonica_rt.schedule.producers import check_count
from harmonica_rt.schedule.schedule import Schedule
from harmonica_rt.schedule.writing import write_file
from harmonica_rt.untrusted.strict_json import type_name
from harmonica_rt.untrusted.text import one_line, quoted

VERSION = 1


@dataclass(frozen=True, repr=False)
class ScheduleSet:
    """Schedules of the same sites, each for another number of steps. Immutable and hashable.

    `compile` takes a set in the place of a schedule: a run is under the schedule for its number of steps, if there is
    one; `on_other_steps` says what happens to other runs.

    Attributes:
        schedules: at least one, in ascending order of their steps.

    Raises:
        ScheduleError: there is no schedule, two have the same number of steps, or two have other sites or were made
            for other models.
    """

    schedules: tuple[Schedule, ...]

    def __init__(self, schedules: Iterable[Schedule]) -> None:
        if isinstance(schedules, Schedule | Mapping) or not isinstance(schedules, Iterable):
            kind = type(schedules).__name__
            raise ScheduleError(f"schedules: expected a list, as in ScheduleSet([schedule]), got a {kind}")
        given = tuple(schedules)
        for number, schedule in enumerate(given):
            if not isinstance(schedule, Schedule):
                raise ScheduleError(f"schedules[{number}]: expected a Schedule, got {type(schedule).__name__}")
        if not given:
            raise ScheduleError("schedules: a set holds at least one schedule")
        ordered = tuple(sorted(given, key=lambda schedule: schedule.steps))
        _check_together(ordered)
        object.__setattr__(self, "schedules", ordered)

    @classmethod
    def of(cls, given: Schedule | ScheduleSet) -> ScheduleSet:
        """The given set, or a set of one schedule."""
        return given if isinstance(given, ScheduleSet) else cls((given,))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, which all schedules share."""
        return self.schedules[0].sites

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps of the schedules, ascending."""
        return tuple(schedule.steps for schedule in self.schedules)

    def nearest(self, steps: int) -> Schedule:
        """The schedule whose number of steps is nearest by ratio: 14 is as far from 7 as from 28.

        Of two that are equally near, the one with more steps: resampling then drops rows and repeats none.

        Raises:
            ScheduleError: `steps` is not a whole number of at least 1.
        """
        asked = check_count(steps, "steps")

        def distance(schedule: Schedule) -> tuple[Fraction, int]:
            return Fraction(max(asked, schedule.steps), min(asked, schedule.steps)), -schedule.steps

        return min(self.schedules, key=distance)

    def resample(self, steps: int) -> Schedule:
        """The schedule for this number of steps: one of the set, or else the nearest one, resampled.

        Raises:
            ScheduleError: see `Schedule.resample`.
        """
        return self.nearest(steps).resample(steps)

    @classmethod
    def load(cls, path: FilePath) -> ScheduleSet:
        """Read the file of a set (docs/schedule-format.md), or all `*.json` of a folder, each of them a schedule file.

        Raises:
            ScheduleFileNotFoundError: there is no such file, or no `*.json` in the folder.
            ScheduleError: a file is malformed in any way; the message names the file and the field.
        """
        source = os.fspath(path)
        if not Path(source).is_dir():
            data = format.read_bytes(source)
            with format.named_errors(source):
                return _parsed(data)
        files = sorted(found for found in Path(source).iterdir() if found.suffix == ".json")
        if not files:
            raise format.ScheduleFileNotFoundError(f"{source}: no schedule file (*.json) in this folder")
        schedules = [Schedule.load(file) for file in files]
        with format.named_errors(source):
            return cls(schedules)

    def save(self, path: FilePath) -> None:
        """Write the set as one JSON file (docs/schedule-format.md), completely or not at all.

        Raises:
            ScheduleWriteError: the file cannot be written (both a ScheduleError and an OSError).
        """
        write_file(path, _text(self))

    def __repr__(self) -> str:
        listed = ", ".join(f"{schedule.steps} (CUR {schedule.cur:.2%})" for schedule in self.schedules)
        return f"<ScheduleSet of {len(self.sites)} sites, steps {listed}>"


def is_set(path: FilePath) -> bool:
    """Whether a path is the file of a set. False if it cannot be read, or is anything else."""
    try:
        return format.read_object(format.read_bytes(os.fspath(path)), "").get("format") == format.SET_FORMAT
    except ScheduleError:
        return False


def _check_together(ordered: Sequence[Schedule]) -> None:
    """Raise ScheduleError unless these schedules, ascending by steps, may be in one set."""
    for before, after in pairwise(ordered):
        if before.steps == after.steps:
            raise ScheduleError(f"schedules: two are for {before.steps} steps; a set has one per number of steps")
        if before.sites != after.sites:
            raise ScheduleError(
                f"schedules: those for {before.steps} and {after.steps} steps have other sites; all of a set have the "
                "same, in the same order"
            )
    models = [schedule.model for schedule in ordered if schedule.model is not None]
    classes = dict.fromkeys(model.class_name for model in models)
    fingerprints = {model.config_fingerprint for model in models} - {None}
    if len(classes) > 1 or len(fingerprints) > 1:
        names = ", ".join(map(one_line, classes))
        raise ScheduleError(f"schedules: made for several models or configs ({names}); all of a set fit one model")


def _text(schedules: ScheduleSet) -> str:
    """The file's text: its fields, and each schedule as in a file of its own, indented."""
    items = [format.to_text(schedule).rstrip("\n").replace("\n", "\n    ") for schedule in schedules.schedules]
    fields = [
        f'"format": "{format.SET_FORMAT}"',
        f'"version": {VERSION}',
        '"schedules": [\n    ' + ",\n    ".join(items) + "\n  ]",
    ]
    return "{\n" + ",\n".join("  " + field for field in fields) + "\n}\n"


def _parsed(data: bytes) -> ScheduleSet:
    document = format.read_object(data, "not a file of schedules")
    name, version = document.get("format"), document.get("version")
    if name != format.SET_FORMAT:
        hint = "Schedule.load reads a single one" if name == format.FORMAT else "this is no set of harmonica-rt"
        raise ScheduleError(f"format: expected {format.SET_FORMAT!r}, got {quoted(name)}; {hint}")
    if type(version) is not int or version != VERSION:
        raise ScheduleError(
            f"version: this harmonica-rt reads version {VERSION} of sets, got {quoted(version)}; a newer file needs a "
            "newer harmonica-rt"
        )
    format.check_fields(document, "", ("format", "version", "schedules"), ())
    return parse_list(document["schedules"], "schedules")


def parse_list(value: object, where: str) -> ScheduleSet:
    """The set of the schedules in a list of JSON objects, each as in a schedule file.

    Raises:
        ScheduleError: not a list of schedules that may be in one set; the message names the place.
    """
    schedules = []
    for number, item in enumerate(check_sequence(value, where)):
        with format.named_errors(f"{where}[{number}]"):
            if not isinstance(item, dict):
                raise ScheduleError(f"expected an object, got {type_name(item)}")
            schedules.append(Schedule(**format.parse_object(item)))
    return ScheduleSet(schedules)
