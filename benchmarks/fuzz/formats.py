"""All formats, by name."""

from __future__ import annotations

from benchmarks.fuzz import recipes, routers, schedules, smoothcache
from benchmarks.fuzz.format import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT for module in (schedules, routers, smoothcache, recipes)
}
