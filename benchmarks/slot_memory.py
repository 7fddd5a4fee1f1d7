"""Compares planned slot memory with a lower bound for any plan, for models whose sites have one size or several.

For two large models, in bf16 and without allocating them, it also compares the levels of sites: what a stream keeps for
sub-layers, blocks, spans, and the output, with plain reuse and with weights.
"""

from __future__ import annotations

import torch
from torch import nn

import harmonica_rt as hrt
from benchmarks import models, schedules, slot_models
from benchmarks.roofline.cases import call_on_meta, on_meta
from benchmarks.rows import Row
from harmonica_rt import Schedule
from harmonica_rt.call.call import CallConvention
from harmonica_rt.capture.capture import capture, capture_model, mark
from harmonica_rt.plan.invariants import check_plan
from harmonica_rt.plan.plan import Plan, build_plan


def run(*, repeats: int, quick: bool) -> list[Row]:
    """Plan a DiT (sites of one size) and a Flux-like model (text and image sites differ) with many schedules."""
    del repeats  # a plan is deterministic
    steps = 10 if quick else 20
    dit = models.dit(layers=28, heads=2, head_dim=8)
    rows = _rows("DiT, 28 blocks (sites of one size)", dit, models.dit_calls(dit, 2, 1)[0], steps, "1")
    flux = slot_models.flux_like()
    for image, text in ((64, 8), (64, 48)):
        name = f"Flux-like, 19 + 38 blocks, {image} image and {text} text tokens"
        rows += _rows(name, flux, slot_models.flux_call(image, text), steps, "at most 1.1")
    if not quick:
        flux = models.flux_on_meta()
        call = models.flux_calls(flux, 1, 1, side=64, text_tokens=512)[0]
        rows += level_rows("Flux 1024, 1 image", flux, call)
        rows += level_rows("Wan 14B, 81 frames of 720 x 1280", slot_models.wan_on_meta(), slot_models.wan_call())
    return rows


def level_rows(case: str, model: nn.Module, arguments: dict[str, object], steps: int = 20) -> list[Row]:
    """Bytes of one stream by the level of its sites, for every(2) with plain reuse and with two weights per entry."""
    model = on_meta(model, torch.bfloat16)
    call = call_on_meta(model, arguments, torch.bfloat16)
    captured = capture_model(model, call)
    rows = []
    for level in ("sublayer", "block", "span", "output"):
        plain = Schedule.every(2, steps=steps, sites=hrt.find_sites(model, level=level))
        for weights, schedule in {"plain": plain, "two weights": plain.with_taylor(1)}.items():
            plan = build_plan(mark(model, captured, schedule.sites), schedule)
            check_plan(plan)
            rows += _plan_rows(case, f"every(2), {weights}, {level}", plan, None)
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


def _plan_rows(case: str, schedule: str, plan: Plan, target: str | None) -> list[Row]:
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
