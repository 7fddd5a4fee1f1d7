"""Schedule files, read by `Schedule.load`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.format import Format
from benchmarks.fuzz.json_damage import damaged_json
from harmonica_rt import Schedule
from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import render
from harmonica_rt.schedule.format import parse, to_text


def document(rng: Random) -> dict[str, Any]:
    """A valid schedule file as plain JSON; each optional field is sometimes left out."""
    steps, blocks = rng.randint(1, 6), rng.randint(1, 3)
    sites = [f"blocks.{block}.{kind}" for block in range(blocks) for kind in ("attn1", "ff")]
    rows = ["1" * len(sites), *("".join(rng.choice("01") for _ in sites) for _ in range(steps - 1))]
    made: dict[str, Any] = {
        "format": "harmonica-schedule", "version": 1, "steps": steps, "sites": sites, "compute": rows,
        "model": {"class_name": "DiT", "config_fingerprint": "sha256:0123456789abcdef"},
        "sampler": {"class_name": "DDIMScheduler", "config": {"beta_start": 0.1, "trained": [1, {"a": None}]}},
        "timesteps": [float(1000 - step) for step in range(steps)],
        "guidance": 1.5,
        "made_by": {
            "method": "harmonica", "hyper_parameters": {"lr": 0.1, "patterns": ["a", "b"]}, "threshold": 0.1,
            "scores": [None, *([rng.gauss(0, 1) for _ in sites] for _ in range(steps - 1))],
        },
    }  # fmt: skip
    for field in ("model", "sampler", "timesteps", "guidance", "made_by"):
        if rng.random() < 0.3:
            del made[field]
    return made


def check(result: object, path: Path) -> None:
    """The schedule survives being saved, and its text has no control characters."""
    assert isinstance(result, Schedule)
    again = Schedule(**parse(to_text(result).encode()))
    assert again == result
    assert hash(again) == hash(result)
    assert repr(result).isprintable()
    assert render(result, width=80).plain.replace("\n", "").isprintable()


FORMAT = Format(
    name="schedule",
    file="schedule.json",
    errors=(ScheduleError,),
    valid=lambda rng: json.dumps(document(rng)).encode(),
    damaged=lambda rng: damaged_json(rng, document(rng)),
    read=Schedule.load,
    check=check,
)
