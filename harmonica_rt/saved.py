"""The file of a compiled model: its schedule and plans, so that another process need not capture and plan again.

JSON without weights and without code; reading it imports and runs nothing. Compiled kernels are not in it; Triton and
Inductor keep their own on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonica_rt import __version__
from harmonica_rt.capture.digest import digest
from harmonica_rt.errors import PlanFileError, ScheduleError
from harmonica_rt.schedule import Schedule, format
from harmonica_rt.schedule.files import write_atomically

FORMAT = "harmonica-rt plan"
VERSION = 1


@dataclass(frozen=True)
class SavedModel:
    """What a file holds: the schedule, the lowering it was compiled with, and its plans as `plan.saved` wrote them."""

    schedule: Schedule
    lowering: str
    plans: tuple[dict[str, Any], ...]


def write(
    path: str | os.PathLike[str], model: nn.Module, schedule: Schedule, lowering: str, plans: Sequence[dict[str, Any]]
) -> None:
    """Write the file, whole or not at all."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "harmonica_rt": __version__,
        "model": digest(model),
        "lowering": lowering,
        "schedule": json.loads(format.to_text(schedule)),
        "plans": list(plans),
    }
    write_atomically(path, json.dumps(document, allow_nan=False, indent=1) + "\n")


def read(path: str | os.PathLike[str], model: nn.Module) -> SavedModel:
    """Read the file for `model`.

    Raises:
        PlanFileError: no such file, not one of these files, or for another model, torch or version.
    """
    source = os.fspath(path)
    try:
        document = json.loads(Path(source).read_bytes())
    except FileNotFoundError as error:
        raise PlanFileError(f"{source}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanFileError(f"{source}: not a saved plan, not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanFileError(f"{source}: not a saved plan; CompiledModel.save writes them")
    if document.get("version") != VERSION:
        raise PlanFileError(f"{source}: version {document.get('version')!r}, this harmonica-rt reads {VERSION}")
    again = "compile the model and save it again"
    for package, version in (("torch", torch.__version__), ("harmonica_rt", __version__)):
        if document.get(package) != version:
            raise PlanFileError(f"{source}: made with {package} {document.get(package)}, this is {version}; {again}")
    if document.get("model") != digest(model):
        raise PlanFileError(
            f"{source}: made for another {type(model).__name__}: its class or its code, configuration, attributes, "
            f"or the layout, dtype, device or sharing of its weights differ; {again}"
        )
    try:
        schedule = Schedule(**format.parse(json.dumps(document["schedule"]).encode()))
        return SavedModel(schedule, document["lowering"], tuple(document["plans"]))
    except (KeyError, TypeError, ScheduleError) as error:
        raise PlanFileError(f"{source}: damaged ({type(error).__name__}: {error}); {again}") from error
