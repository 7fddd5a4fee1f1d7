"""Books of InvarDiff, read by `Schedule.from_invardiff`."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from benchmarks.fuzz import schedules
from benchmarks.fuzz.format import Format
from benchmarks.fuzz.json_damage import damaged_json
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

BLOCKS = 2
_DOUBLE = {"attn": "attn", "context_attn": "attn", "ff": "ff", "context_ff": "ff_context", "ip_attn": "attn"}
_SINGLE = {"attn": "attn", "mlp": "act_mlp"}
SITES = tuple(
    f"{blocks}.{block}.{part}"
    for blocks, parts in (
        ("transformer_blocks", ("attn1", *dict.fromkeys(_DOUBLE.values()))),
        ("single_transformer_blocks", _SINGLE.values()),
    )
    for block in range(BLOCKS)
    for part in parts
)


def document(rng: Random) -> dict[str, Any]:
    """A valid file, for DiT or for Flux."""
    steps = rng.randint(1, 6)

    def book() -> list[list[bool]]:
        return [[step > 0 and rng.random() < 0.5 for _ in range(BLOCKS)] for step in range(steps)]

    reused = [step > 0 and rng.random() < 0.5 for step in range(steps)]
    if rng.random() < 0.5:
        return {"step_cache_book": reused, "msa_cache_book": book(), "mlp_cache_book": book()}
    return {
        "step_cache_book": reused,
        "transformer_cache_book": {name: book() for name in _DOUBLE},
        "single_transformer_cache_book": {name: book() for name in _SINGLE},
    }


FORMAT = Format(
    name="invardiff",
    file="invardiff.json",
    errors=(ScheduleError,),
    valid=lambda rng: json.dumps(document(rng)).encode(),
    damaged=lambda rng: damaged_json(rng, document(rng)),
    read=lambda path: Schedule.from_invardiff(path, sites=SITES),
    check=schedules.check,
)
