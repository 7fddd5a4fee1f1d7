"""The file of a compiled model: its schedule and plans, so that another process need not capture and plan again.

JSON without weights and without code. The hazard: such files are passed around, and what reads one must not do what it
says. So a digest over its contents finds damage and careless edits, and since anyone can write a digest, all of it is
checked as well against the model and against what this package writes. The worst that a forged file can do is to make
wrong images, or to take as much memory and time as a large model would. Compiled kernels are not in it; Triton and
Inductor keep their own on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonica_rt.errors import PlanFileError, ScheduleError
from harmonica_rt.model.fingerprint import digest
from harmonica_rt.options import LOWERINGS
from harmonica_rt.planfile.json_fields import fields_of, items_of, refused
from harmonica_rt.schedule import Schedule, format
from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.untrusted.text import quoted
from harmonica_rt.version import __version__

FORMAT = "harmonica-rt plan"
VERSION = 2
LARGEST_FILE = 2**28  # bytes; a plan of 1000 steps and 10000 operators takes about a hundredth of it

_FIELDS = ("format", "version", "torch", "harmonica_rt", "digest", "model", "lowering", "schedule", "plans")
_AGAIN = "compile the model and save it again"


@dataclass(frozen=True)
class SavedModel:
    """What a file holds: the schedule, the lowering it was compiled with, and its plans as `plan_record` wrote them."""

    schedule: Schedule
    lowering: str
    plans: tuple[Any, ...]


def write(
    path: str | os.PathLike[str], model: nn.Module, schedule: Schedule, lowering: str, plans: Sequence[dict[str, Any]]
) -> None:
    """Write the file, whole or not at all."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "harmonica_rt": __version__,
        "model": digest(model),
        "lowering": lowering,
        "schedule": json.loads(format.to_text(schedule)),
        "plans": list(plans),
    }
    document["digest"] = contents_digest(document)
    write_atomically(path, json.dumps(document, allow_nan=False, indent=1) + "\n")


def contents_digest(document: dict[str, Any]) -> str:
    """The digest of everything that a file holds besides it; line breaks and the order of fields do not count."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    text = json.dumps(rest, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read(path: str | os.PathLike[str], model: nn.Module) -> SavedModel:
    """Read the file for `model`. Its plans are left as they are: `plan_record` checks and decodes them.

    Raises:
        PlanFileError: no such file, not one of these files, damaged, or for another model, torch or version.
    """
    source = os.fspath(path)
    try:
        return _parse(_contents(source), model)
    except PlanFileError as error:
        raise PlanFileError(f"{source}: {error}") from error


def _contents(source: str) -> bytes:
    try:
        with Path(source).open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise PlanFileError("no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise PlanFileError(f"cannot be read ({error})") from error
    if len(data) > LARGEST_FILE:
        raise PlanFileError(f"not a saved plan: larger than {LARGEST_FILE} bytes")
    return data


def _parse(data: bytes, model: nn.Module) -> SavedModel:
    try:
        document = format.read_object(data, "not a saved plan")
    except ScheduleError as error:
        raise PlanFileError(str(error)) from error
    if document.get("format") != FORMAT:
        raise PlanFileError("not a saved plan; CompiledModel.save writes them")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise PlanFileError(f"version {quoted(version)}, this harmonica-rt reads {VERSION}; {_AGAIN}")
    for package, here in (("torch", str(torch.__version__)), ("harmonica_rt", __version__)):
        if document.get(package) != here:
            raise PlanFileError(f"made with {package} {quoted(document.get(package))}, this is {here!r}; {_AGAIN}")
    fields_of(document, "the file", _FIELDS)
    if document["digest"] != contents_digest(document):
        raise PlanFileError(f"damaged or edited: its contents are not those that its digest is of; {_AGAIN}")
    if document["model"] != digest(model):
        raise PlanFileError(
            f"made for another {type(model).__name__}: its class or its code, configuration, attributes, "
            f"or the layout, dtype, device or sharing of its weights differ; {_AGAIN}"
        )
    if document["lowering"] not in LOWERINGS:
        raise refused("lowering", f"one of {', '.join(LOWERINGS)}", document["lowering"])
    try:
        schedule = Schedule(**format.parse(json.dumps(document["schedule"]).encode()))
    except ScheduleError as error:
        raise PlanFileError(f"damaged, schedule: {error}; {_AGAIN}") from error
    return SavedModel(schedule, document["lowering"], tuple(items_of(document["plans"], "plans")))
