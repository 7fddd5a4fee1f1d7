"""Options of cache-dit (YAML), read by `Schedule.from_cache_dit`."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from benchmarks.fuzz import schedules
from benchmarks.fuzz.format import Format, garbled
from benchmarks.fuzz.json_damage import damaged_json
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError

SITES = tuple(f"blocks.{block}.{kind}" for block in range(3) for kind in ("attn", "mlp"))
YAML = (
    "&a [1, *a]",
    "*a",
    "!!python/object/apply:os.system ['true']",
    "2001-99-99",
    "1:60",
    "0x",
    "- 1",
    "{",
    "? x",
    "|",
)


def document(rng: Random) -> dict[str, Any]:
    """Valid options, which JSON can write: every JSON text of this kind is YAML."""
    steps = rng.randint(1, 6)
    return {
        "cache_config": {
            "steps_computation_mask": [1, *(rng.randrange(2) for _ in range(steps - 1))],
            "steps_computation_policy": "static", "num_inference_steps": steps, "Fn_compute_blocks": rng.randint(1, 3),
            "Bn_compute_blocks": rng.randint(0, 2), "residual_diff_threshold": 0.08,
            "enable_taylorseer": rng.random() < 0.5, "taylorseer_order": rng.randint(1, 3),
        }
    }  # fmt: skip


def valid(rng: Random) -> bytes:
    """A file as cache-dit's own look, one option per line."""
    options = document(rng)["cache_config"]
    return ("cache_config:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in options.items())).encode()


def damaged(rng: Random) -> bytes:
    """Changed options, odd YAML in the place of a value, or garbled bytes."""
    match rng.randrange(3):
        case 0:
            return damaged_json(rng, document(rng))
        case 1:
            lines = valid(rng).decode().splitlines(keepends=True)
            at = rng.randrange(len(lines))
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(YAML) + "\n"
            return "".join(lines).encode()
        case _:
            return garbled(rng, valid(rng))


FORMAT = Format(
    name="cache-dit",
    file="cache.yaml",
    errors=(ScheduleError,),
    valid=valid,
    damaged=damaged,
    read=lambda path: Schedule.from_cache_dit(path, sites=SITES),
    check=schedules.check,
)
