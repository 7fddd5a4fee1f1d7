"""All formats by name."""

from __future__ import annotations

from benchmarks.fuzz import (
    cache_dit,
    checkpoints,
    conditions,
    invardiff,
    plan_file,
    recipes,
    routers,
    schedules,
    smoothcache,
)
from benchmarks.fuzz.format import Format

_ALL = (
    schedules.FORMAT,
    routers.FORMAT,
    smoothcache.FORMAT,
    cache_dit.FORMAT,
    invardiff.FORMAT,
    recipes.FORMAT,
    checkpoints.FORMAT,
    conditions.EMBEDDINGS,
    conditions.PROMPTS,
    plan_file.FORMAT,
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
