"""Reads the files of a run back, as data; a damaged one raises a TrainingError that names it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harmonica_rt.untrusted import strict_json
from harmonica_rt.untrusted.text import one_line
from harmonica_training import safetensors_file
from harmonica_training.errors import TrainingError

# what torch's reader raises on damaged archives
_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, ValueError, AttributeError)
_REMEDY = "delete it, and the next run makes it again"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        FileNotFoundError: there is no such file.
        TrainingError: it is not strict JSON, or not an object.
    """
    try:
        return strict_json.parse_object(path.read_bytes())
    except strict_json.JsonError as error:
        raise TrainingError(f"{path}: {error}; {_REMEDY}") from error


def read_torch(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """The dict in a file of `torch.save`, which holds these names.

    Raises:
        FileNotFoundError: there is no such file.
        TrainingError: it is damaged, holds more than tensors and plain values, or lacks a name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise TrainingError(f"{path}: not a readable file of torch ({one_line(error, 200)}); {_REMEDY}") from error
    if not isinstance(content, dict) or not set(names) <= content.keys():
        raise TrainingError(f"{path}: expected a dict with {', '.join(names)}; {_REMEDY}")
    return content


def read_state(path: Path, model: torch.nn.Module) -> None:
    """Load the parameters of a model from a file of safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        TrainingError: it is damaged, or of another model.
    """
    try:
        model.load_state_dict(safetensors_file.read(path)[0])
    except (safetensors_file.UnreadableError, RuntimeError) as error:
        raise TrainingError(f"{path}: not the parameters of this model ({one_line(error, 300)}); {_REMEDY}") from error
