"""Recipes: the options of a command for a set-up that is known, as JSON. Those of the paper come with the package.

A recipe has `about` (what it is, and where its values come from), `model` (where its model is, or null), `options` (of
every command that takes them) and `train` (of the command `train` alone), both by the options' names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from harmonica_rt.errors import HarmonicaError


@dataclass(frozen=True)
class Recipe:
    """A set-up.

    Attributes:
        about: what it is, and where its values come from.
        model: the hub's id of its pipeline; None for a recipe that goes with any.
        options: of every command.
        train: of the command `train` alone.
    """

    about: str
    model: str | None
    options: dict[str, Any]
    train: dict[str, Any]


def known() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def read(name_or_file: str) -> Recipe:
    """A recipe of the package by its name, or one of your own by its file.

    Raises:
        HarmonicaError: there is none, or it is malformed.
    """
    if name_or_file in known():
        text = (resources.files(__name__) / f"{name_or_file}.json").read_text("utf-8")
    else:
        try:
            text = Path(name_or_file).read_text("utf-8")
        except OSError as error:
            raise HarmonicaError(
                f"recipe {name_or_file}: no such file, and no recipe of that name; there are {', '.join(known())}"
            ) from error
    try:
        fields = json.loads(text)
        recipe = Recipe(**fields)
    except (ValueError, TypeError) as error:
        raise HarmonicaError(
            f"recipe {name_or_file}: expected a JSON object with about, model, options and train: {error}"
        ) from error
    if not isinstance(recipe.options, dict) or not isinstance(recipe.train, dict):
        raise HarmonicaError(f"recipe {name_or_file}: options and train must be JSON objects")
    return recipe
