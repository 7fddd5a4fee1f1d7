"""The file of a compiled model: its schedule and plans, so that another process need not capture and plan again.

The file is JSON without parameters and without code. Hazard: such files are passed around, and a reader must not
execute what one says. So a digest of the contents detects damage and careless edits. Since anyone can compute a
digest, all contents are also checked against the model and against what this package writes. At worst, a forged file
gives wrong images, or takes as much memory and time as a large model would. Compiled kernels are not in the file;
Triton and Inductor keep theirs on disk themselves.
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
from harmonica_rt.options import LOWERINGS, OTHER_STEPS, CompileOptions
from harmonica_rt.planfile.json_fields import fields_of, items_of, refused
from harmonica_rt.schedule import Schedule, ScheduleSet, format
from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.schedule.schedule_set import parse_list
from harmonica_rt.untrusted.text import quoted
from harmonica_rt.version import __version__

FORMAT = "harmonica-rt plan"
VERSION = 3
LARGEST_FILE = 2**28  # bytes; a plan of 1000 steps and 10000 operators takes about a hundredth of that

_FIELDS = (
    *("format", "version", "torch", "harmonica_rt", "digest", "model"),
    *("lowering", "on_other_steps", "schedules", "plans"),
)
_REMEDY = "compile the model and save it again"


@dataclass(frozen=True)
class SavedModel:
    """The contents of a file: what the model was compiled with, and plans as encoded by `plan_record`."""

    schedule: Schedule | ScheduleSet
    lowering: str
    on_other_steps: str
    plans: tuple[Any, ...]


def write(
    path: str | os.PathLike[str],
    model: nn.Module,
    schedule: Schedule | ScheduleSet,
    options: CompileOptions,
    plans: Sequence[dict[str, Any]],
) -> None:
    """Write the file atomically: completely or not at all."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "harmonica_rt": __version__,
        "model": digest(model),
        "lowering": options.lowering,
        "on_other_steps": options.on_other_steps,
        "schedules": [json.loads(format.to_text(each)) for each in ScheduleSet.of(schedule).schedules],
        "plans": list(plans),
    }
    document["digest"] = contents_digest(document)
    write_atomically(path, json.dumps(document, allow_nan=False, indent=1) + "\n")


def contents_digest(document: dict[str, Any]) -> str:
    """The digest of a file without its `digest` field; line breaks and the order of fields do not matter."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    text = json.dumps(rest, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read(path: str | os.PathLike[str], model: nn.Module) -> SavedModel:
    """Read the file for `model`. The plans are returned undecoded: `plan_record` checks and decodes them.

    Raises:
        PlanFileError: the file is missing, not a plan file, damaged, or for another model, torch or version.
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
        raise PlanFileError(f"version {quoted(version)}, this harmonica-rt reads {VERSION}; {_REMEDY}")
    for package, here in (("torch", str(torch.__version__)), ("harmonica_rt", __version__)):
        if document.get(package) != here:
            raise PlanFileError(f"made with {package} {quoted(document.get(package))}, this is {here!r}; {_REMEDY}")
    fields_of(document, "the file", _FIELDS)
    if document["digest"] != contents_digest(document):
        raise PlanFileError(f"damaged or edited: its contents do not match its digest; {_REMEDY}")
    if document["model"] != digest(model):
        raise PlanFileError(
            f"made for another {type(model).__name__}: its class or its code, configuration, attributes, "
            f"or the layout, dtype, device or sharing of its parameters differ; {_REMEDY}"
        )
    if document["lowering"] not in LOWERINGS:
        raise refused("lowering", f"one of {', '.join(LOWERINGS)}", document["lowering"])
    if document["on_other_steps"] not in OTHER_STEPS:
        raise refused("on_other_steps", f"one of {', '.join(OTHER_STEPS)}", document["on_other_steps"])
    try:
        schedules = parse_list(document["schedules"], "schedules")
    except ScheduleError as error:
        raise PlanFileError(f"damaged, {error}; {_REMEDY}") from error
    schedule = schedules if len(schedules.schedules) > 1 else schedules.schedules[0]
    plans = tuple(items_of(document["plans"], "plans"))
    return SavedModel(schedule, document["lowering"], document["on_other_steps"], plans)
