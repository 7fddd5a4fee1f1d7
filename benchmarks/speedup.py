"""Realised and theoretical speed-up of whole runs, compiled with `plain`, over the uncached eager model.

The theoretical speed-up is FLOPs of an uncached run / FLOPs of the step programs. A schedule is timed only after the
compiled outputs equalled the reference's bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.rows import Row, spread_row
from benchmarks.timing import interleaved

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
    providers: dict[str, Callable[[], object]] = {"uncached": case.run_uncached}
    compiled: dict[str, hrt.CompiledModel] = {}
    for name, schedule in chosen.items():
        hrt.verify(case.model, schedule, calls=case.calls, lowering="plain")  # raises unless equal bit for bit
        compiled[name] = hrt.compile(case.model, schedule, lowering="plain", strict=True)
        providers[name] = functools.partial(case.run_compiled, compiled[name])
    seconds = interleaved(providers, repeats)
    uncached = seconds["uncached"]
    rows = [spread_row("speedup", case.name, "none", "uncached eager run", uncached, "s")]
    for name, model in compiled.items():
        ratios = [a / b for a, b in zip(uncached, seconds[name], strict=True)]
        theory = model.report().plans[0].theoretical_speedup
        shares = [ratio / theory for ratio in ratios]
        rows += [
            spread_row("speedup", case.name, name, "compiled run", seconds[name], "s"),
            Row("speedup", case.name, name, "theoretical speed-up", theory, "ratio"),
            spread_row("speedup", case.name, name, "realised speed-up", ratios, "ratio"),
            spread_row("speedup", case.name, name, "realised / theoretical", shares, "ratio", target),
        ]
    return rows
