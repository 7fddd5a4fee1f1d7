"""Compares whole runs under every(2) by the level of the sites, with plain reuse and with two weights per entry.

All runs use the `fused` lowering and take turns. Each ratio is that of a run to the run in the same round that reuses
sub-layers plainly. A schedule is timed only after the outputs of its first steps were compared with the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import harmonica_rt as hrt
from benchmarks import models
from benchmarks.end_to_end import CHECKED, STEPS
from benchmarks.rows import Row, spread_row
from benchmarks.timing import interleaved
from harmonica_rt import Schedule

TARGETS = {
    "sublayer, two weights": "at most 1.03",
    **{f"{level}, {weights}": "at most 0.98" for level in ("span", "output") for weights in ("plain", "two weights")},
}
BASE = "sublayer, plain"


def run(*, repeats: int, quick: bool, only: str = "") -> list[Row]:
    """The bundled model at batch 1 and 8, a DiT of 12 blocks, and DiT-XL/2 geometry; those whose names contain `only`.

    Raises:
        ParityError: the outputs of a schedule differ from the reference.
    """
    if quick:
        return case_rows(models.bundled(1, 6), repeats)
    cases: dict[str, tuple[Callable[[], models.Case], int]] = {
        "bundled, batch 1": (lambda: models.bundled(1, STEPS), repeats),
        "bundled, batch 8": (lambda: models.bundled(8, STEPS), repeats),
        "DiT 12x384": (lambda: models.dit_12x384(2, STEPS), repeats),
        "DiT-XL": (lambda: models.dit_xl_2(2, STEPS), min(repeats, 3)),  # a round takes minutes
    }
    return [row for name, (build, rounds) in cases.items() if only in name for row in case_rows(build(), rounds)]


def case_rows(case: models.Case, repeats: int) -> list[Row]:
    """The rows of one model: seconds, ratios, and the theoretical speed-up that each run realised."""
    providers: dict[str, Callable[[], object]] = {"uncached": case.run_uncached}
    theory: dict[str, float] = {}
    for name, schedule in schedules_of(case).items():
        first = Schedule.from_array(schedule.compute[:CHECKED], sites=schedule.sites)
        if schedule.weights is not None:
            first = first.with_weights(schedule.weights[:CHECKED])
        hrt.verify(case.model, first, calls=case.calls[:CHECKED], lowering="fused")
        compiled = hrt.compile(case.model, schedule, lowering="fused", strict=True)
        providers[name] = functools.partial(case.run_compiled, compiled)
        providers[name]()  # timesteps become known in this run
        theory[name] = compiled.report().plans[0].theoretical_speedup
    seconds = interleaved(providers, repeats)
    rows = []
    for name, speedup in theory.items():
        ratios = [own / base for own, base in zip(seconds[name], seconds[BASE], strict=True)]
        realised = [a / b / speedup for a, b in zip(seconds["uncached"], seconds[name], strict=True)]
        rows.append(spread_row("site_levels", case.name, name, "run", seconds[name], "s"))
        rows.append(spread_row("site_levels", case.name, name, f"run / {BASE}", ratios, "ratio", TARGETS.get(name)))
        rows.append(spread_row("site_levels", case.name, name, "realised / theoretical", realised, "ratio"))
    return rows


def schedules_of(case: models.Case) -> dict[str, Schedule]:
    """every(2) for each level of sites, with plain reuse and with the weights of a line through two values."""
    found = {}
    for level in ("sublayer", "block", "span", "output"):
        plain = Schedule.every(2, steps=len(case.calls), sites=hrt.find_sites(case.model, level=level))
        found[f"{level}, plain"] = plain
        found[f"{level}, two weights"] = plain.with_taylor(1)
    return found
