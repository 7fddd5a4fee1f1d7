"""Recipes, read by `recipes.read`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.format import Format
from benchmarks.fuzz.json_damage import damaged_json
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.recipes import Recipe, read


def document(rng: Random) -> dict[str, Any]:
    """A valid recipe."""
    return {
        "about": "What it is",
        "model": rng.choice((None, "owner/name")),
        "options": {"sampler": "DDIMScheduler", "guidance": 1.5, "arg": ["height=256", "width=256"]},
        "train": {"steps": rng.randint(2, 50), "target_cur": 0.25, "checkpointing": rng.random() < 0.5},
    }


def check(result: object, path: Path) -> None:
    """Every option is a value that a command line can give, and the recipe equals the file."""
    assert isinstance(result, Recipe)
    for value in [*result.options.values(), *result.train.values()]:
        for one in value if isinstance(value, list) else [value]:
            assert isinstance(one, str | bool | int | float)
    assert json.loads(path.read_bytes()) == vars(result)


FORMAT = Format(
    name="recipe",
    file="recipe.json",
    errors=(HarmonicaError,),
    valid=lambda rng: json.dumps(document(rng)).encode(),
    damaged=lambda rng: damaged_json(rng, document(rng)),
    read=lambda path: read(str(path)),
    check=check,
)
