"""Realised against theoretical speed-up of whole runs, compiled (`plain`) against the uncached eager model.

Theoretical: FLOPs of an uncached run / FLOPs of the step programs. A run counts only after its compiled outputs were
equal to the reference's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.rows import Row
from benchmarks.timing import Spread, interleaved

STEPS = 20


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Measure the bundled model at batch 8 and a DiT of 12 blocks x 384 at batch 2."""
    steps = 6 if quick else STEPS
    rows = _case(models.bundled(8, steps), repeats, "at least 0.80")
    rows += _case(models.dit_12x384(2, steps), repeats, "at least 0.85")
    return rows


def _case(case: models.Case, repeats: int, target: str) -> list[Row]:
    sites = hrt.find_sites(case.model)
    chosen = schedules.standard(sites, len(case.calls))
    providers: dict[str, Callable[[], object]] = {"uncached": lambda: _uncached(case)}
    compiled: dict[str, hrt.CompiledModel] = {}
    for name, schedule in chosen.items():
        hrt.verify(case.model, schedule, calls=case.calls)  # raises unless equal bit for bit
        compiled[name] = hrt.compile(case.model, schedule, strict=True)
        providers[name] = lambda model=compiled[name]: _compiled(model, case)  # type: ignore[misc]
    seconds = interleaved(providers, repeats)
    base = Spread.of(seconds["uncached"])
    rows = [Row("speedup", case.name, "none", "uncached eager run", base.p50, "s", base.p20, base.p80, repeats)]
    for name, model in compiled.items():
        took = Spread.of(seconds[name])
        ratio = Spread.of([a / b for a, b in zip(seconds["uncached"], seconds[name], strict=True)])
        theory = model.report().plans[0].theoretical_speedup
        rows += [
            Row("speedup", case.name, name, "compiled run", took.p50, "s", took.p20, took.p80, repeats),
            Row("speedup", case.name, name, "theoretical speed-up", theory, "ratio"),
            Row(
                "speedup",
                case.name,
                name,
                "realised speed-up",
                ratio.p50,
                "ratio",
                ratio.p20,
                ratio.p80,
                repeats,
            ),
            Row(
                "speedup",
                case.name,
                name,
                "realised / theoretical",
                ratio.p50 / theory,
                "ratio",
                ratio.p20 / theory,
                ratio.p80 / theory,
                repeats,
                target,
            ),
        ]
    return rows


@torch.no_grad()
def _uncached(case: models.Case) -> None:
    for call in case.calls:
        case.model(**call)


@torch.no_grad()
def _compiled(model: hrt.CompiledModel, case: models.Case) -> None:
    model.reset()
    for call in case.calls:
        model(**call)
