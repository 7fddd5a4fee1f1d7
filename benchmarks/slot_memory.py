"""Compares planned slot memory with a lower bound for any plan, for models whose sites have one size or several."""

from __future__ import annotations

from torch import nn

import harmonica_rt as hrt
from benchmarks import models, schedules
from benchmarks.rows import Row
from harmonica_rt import Schedule
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Plan a DiT (sites of one size) and a Flux-like model (text and image sites differ) with many schedules."""
    del repeats  # a plan is deterministic
    steps = 10 if quick else 20
    dit = models.dit(layers=28, heads=2, head_dim=8)
    rows = _rows("DiT, 28 blocks (sites of one size)", dit, models.dit_calls(dit, 2, 1)[0], steps, "1")
    flux = models.flux_like()
    for image, text in ((64, 8), (64, 48)):
        name = f"Flux-like, 19 + 38 blocks, {image} image and {text} text tokens"
        rows += _rows(name, flux, models.flux_call(image, text), steps, "at most 1.1")
    return rows


def _rows(case: str, model: nn.Module, call: dict[str, object], steps: int, target: str) -> list[Row]:
    sites = hrt.find_sites(model)
    captured = capture(model, CallConvention(model).normalise((), call), sites)
    rows = []
    for name, schedule in _schedules(sites, steps).items():
        plan = build_plan(captured, schedule)
        check_plan(plan)
        rows += _plan_rows(case, name, plan, target)
    return rows


def _schedules(sites: list[str], steps: int) -> dict[str, Schedule]:
    found = schedules.standard(sites, steps)
    for percent in (30, 70):
        found[f"random {percent} %"] = Schedule.random(percent / 100, steps=steps, sites=sites, seed=1)
    found["10 patterns"] = schedules.ten_patterns(sites, steps)
    return found


def _plan_rows(case: str, schedule: str, plan: Plan, target: str) -> list[Row]:
    planned, bound = sum(plan.table.arena_bytes.values()), sum(plan.table.lower_bound.values())
    figures: list[tuple[str, float, str, str | None]] = [
        ("planned", planned, "bytes", None),
        ("lower bound", bound, "bytes", None),
        ("planned / lower bound", planned / bound, "ratio", target),
        ("one address per site", plan.table.site_addresses_bytes, "bytes", None),
        ("step programs", len(plan.programs), "count", None),
        ("programs with addresses", plan.programs_with_addresses, "count", None),
    ]
    return [
        Row("slot_memory", case, schedule, metric, value, unit, target=wanted)
        for metric, value, unit, wanted in figures
    ]
