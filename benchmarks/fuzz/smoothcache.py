"""SmoothCache schedules, read by `Schedule.from_smoothcache`."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from benchmarks.fuzz import schedules
from benchmarks.fuzz.format import Format
from benchmarks.fuzz.json_damage import damaged_json
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

SITES = tuple(f"blocks.{block}.{kind}" for block in range(2) for kind in ("attn", "mlp"))


def document(rng: Random) -> dict[str, Any]:
    """A valid file: one list per component, or per component and block."""
    steps = rng.randint(1, 6)
    names = rng.choice((["attn", "mlp"], ["attn-0", "attn-1", "mlp"]))
    return {name: [1, *(rng.randrange(2) for _ in range(steps - 1))] for name in names}


FORMAT = Format(
    name="smoothcache",
    file="smoothcache.json",
    errors=(ScheduleError,),
    valid=lambda rng: json.dumps(document(rng)).encode(),
    damaged=lambda rng: damaged_json(rng, document(rng)),
    read=lambda path: Schedule.from_smoothcache(path, sites=SITES),
    check=schedules.check,
)
