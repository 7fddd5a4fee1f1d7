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

MAKERS = (
    {"method": "taylor", "hyper_parameters": {"order": 1, "since": 0}},
    {"method": "chebyshev", "hyper_parameters": {"degree": 4, "ridge": 0.1, "blend": 1.0, "values": 4}},
    {"method": "fit", "hyper_parameters": {"images": 64, "prompts": ["a", "b"]}},
)


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
    if rng.random() < 0.5:
        made |= {"version": 2, "weights": _weights(rng, sites, rows)}
        if rng.random() < 0.7:
            made["weights_by"] = rng.choice(MAKERS)
    return made


def _weights(rng: Random, sites: list[str], rows: list[str]) -> list[Any]:
    """Weights that fit the mask: shared by the sites of a step, or one list for each."""
    items: list[Any] = []
    for step, row in enumerate(rows):
        reused = [place for place, bit in enumerate(row) if bit == "0"]
        most = {place: min(4, sum(earlier[place] == "1" for earlier in rows[:step])) for place in reused}
        lists = {sites[place]: _numbers(rng, rng.randint(1, most[place])) for place in reused}
        shared = rng.random() < 0.5 and bool(reused)
        items.append(_numbers(rng, rng.randint(1, min(most.values()))) if shared else lists or [])
    return items


def _numbers(rng: Random, count: int) -> list[float]:
    return [1.5, *(rng.choice((0, -0.5, 1e-30, rng.gauss(0, 1))) for _ in range(count - 1))]


def check(result: object, path: Path) -> None:
    """The schedule survives being saved and resampled, and its text has no control characters."""
    assert isinstance(result, Schedule)
    again = Schedule(**parse(to_text(result).encode()))
    assert again == result
    assert hash(again) == hash(result)
    assert _resampled(result)
    assert repr(result).isprintable()
    assert render(result, width=80).plain.replace("\n", "").isprintable()


def _resampled(schedule: Schedule) -> bool:
    """Whether it can be resampled, or says why not."""
    try:
        return schedule.resample(schedule.steps + 2).steps == schedule.steps + 2
    except ScheduleError as error:
        return "float32" in str(error)


FORMAT = Format(
    name="schedule",
    file="schedule.json",
    errors=(ScheduleError,),
    valid=lambda rng: json.dumps(document(rng)).encode(),
    damaged=lambda rng: damaged_json(rng, document(rng)),
    read=Schedule.load,
    check=check,
)
