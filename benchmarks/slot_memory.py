"""Planned cache bytes against the bound that no plan can beat, for sites of one size and of several."""

from __future__ import annotations

from torch import nn

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.rows import Row
from harmonica_rt.report import PlanReport
from harmonica_rt.schedule import Schedule


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Plan DiT (one size) and Flux-like (text and image tokens: several) models with many schedules."""
    del repeats  # a plan is the same every time
    steps = 10 if quick else 20
    dit = models.dit(layers=28, heads=2, head_dim=8)
    rows = _rows("DiT, 28 blocks (sites of one size)", dit, models.dit_calls(dit, 2, 1)[0], steps, "1")
    flux = models.flux_like()
    for image, text in ((64, 8), (64, 48)):
        name = f"Flux-like, 19 + 38 blocks, {image} image and {text} text tokens"
        rows += _rows(name, flux, models.flux_call(image, text), steps, "at most 1.1")
    return rows


def _rows(case: str, model: nn.Module, call: dict[str, object], steps: int, target: str) -> list[Row]:
    rows = []
    for name, schedule in _schedules(hrt.find_sites(model), steps).items():
        compiled = hrt.compile(model, schedule, strict=True)
        compiled(**call)
        plan = compiled.report().plans[0]
        rows += _plan_rows(case, name, plan, target)
    return rows


def _schedules(sites: list[str], steps: int) -> dict[str, Schedule]:
    found = schedules.standard(sites, steps)
    for percent in (30, 70):
        found[f"random {percent} %"] = Schedule.random(percent / 100, steps=steps, sites=sites, seed=1)
    found["10 patterns"] = schedules.ten_patterns(sites, steps)
    return found


def _plan_rows(case: str, schedule: str, plan: PlanReport, target: str) -> list[Row]:
    return [
        Row("slot_memory", case, schedule, "planned", plan.arena_bytes, "bytes"),
        Row("slot_memory", case, schedule, "lower bound", plan.lower_bound_bytes, "bytes"),
        Row(
            "slot_memory",
            case,
            schedule,
            "planned / lower bound",
            plan.arena_bytes / plan.lower_bound_bytes,
            "ratio",
            target=target,
        ),
        Row("slot_memory", case, schedule, "one address a site", plan.site_addresses_bytes, "bytes"),
        Row("slot_memory", case, schedule, "step programs", plan.programs, "count"),
        Row("slot_memory", case, schedule, "programs with addresses", plan.programs_with_addresses, "count"),
    ]
