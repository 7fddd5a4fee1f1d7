"""Recipes: command options for known set-ups, as JSON files. Those of the HarmoniCa paper come with the package.

In: the name of a bundled recipe, or a file. Out: a `Recipe`; `cli.options` makes its options the defaults of a command.
Hazard: if a misspelt field or option were ignored, another set-up would run. So unknown and missing fields are errors
here, and unknown options are errors where a command takes the recipe.

A file holds `about` (what it is, and where its values come from), `model` (a Hub id, or null), `options` (for all
commands) and `train` (for the command `train` alone); the last two map names of options to values, with underscores as
in Python (`sampler_arg`). The module `uvit` defines U-ViT, the model of one of the set-ups, which diffusers lacks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.untrusted import strict_json
from harmonica_rt.untrusted.text import one_line, quoted


@dataclass(frozen=True)
class Recipe:
    """The options of a known set-up.

    Attributes:
        about: what it is, and where its values come from.
        model: the Hub id of its pipeline; None if the recipe suits any.
        options: options for all commands.
        train: options for the command `train` alone.
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
    """Read a bundled recipe by its name, or any recipe by its file.

    Raises:
        HarmonicaError: there is no such recipe, it cannot be read, or it is malformed: it is not strict JSON, a
            field is unknown or missing, or an option is not text, a number, a boolean or a list of these.
    """
    try:
        if name_or_file in known():
            data = (resources.files(__name__) / f"{name_or_file}.json").read_bytes()
        else:
            data = Path(name_or_file).read_bytes()
    except FileNotFoundError as error:
        raise HarmonicaError(
            f"recipe {name_or_file}: no such file, and no recipe of that name; there are {', '.join(known())}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise HarmonicaError(f"recipe {name_or_file}: cannot be read ({error})") from error
    try:
        return _recipe(strict_json.parse_object(data))
    except ValueError as error:
        raise HarmonicaError(
            f"recipe {name_or_file}: expected a JSON object with about, model, options and train: {error}"
        ) from error


def _recipe(fields: dict[str, object]) -> Recipe:
    """The recipe with these fields; raises ValueError naming the field that is wrong."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    if unknown := [name for name in fields if name not in names]:
        raise ValueError(f"{one_line(unknown[0])}: unknown field")
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{missing[0]}: missing field")
    match fields:
        case {"about": str(about), "model": str() | None as model, "options": dict(options), "train": dict(train)}:
            for name, value in [*options.items(), *train.items()]:
                _check_option(name, value)
            return Recipe(about, model, options, train)
    raise ValueError("about must be text, model text or null; options and train must be JSON objects")


def _check_option(name: str, value: object) -> None:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | bool | int | float) for one in values):
        raise ValueError(
            f"{one_line(name)}: expected text, a number, a boolean, or a list of them, got {quoted(value)}"
        )
