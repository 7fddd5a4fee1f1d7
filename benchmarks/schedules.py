"""The schedules that several benchmarks measure."""

from __future__ import annotations

import dataclasses

import numpy as np

from harmonica_rt import Schedule


def standard(sites: list[str], steps: int) -> dict[str, Schedule]:
    """every(2), every(3), and a random schedule that reuses half of all entries."""
    return {
        "every(2)": Schedule.every(2, steps=steps, sites=sites),
        "every(3)": Schedule.every(3, steps=steps, sites=sites),
        "random 50 %": Schedule.random(0.5, steps=steps, sites=sites, seed=0),
    }


def released(sites: list[str], steps: int) -> dict[str, Schedule]:
    """every(2), and the released Learning-to-Cache schedule (DiT-XL/2, 20 DDIM steps) if it fits sites and steps."""
    found = {"every(2)": Schedule.every(2, steps=steps, sites=sites)}
    theirs = Schedule.known("dit-xl-2-256-ddim20-l2c")
    if list(theirs.sites) == sites and theirs.steps == steps:
        found["released Learning-to-Cache"] = dataclasses.replace(
            theirs, model=None
        )  # the model here has random parameters and another config
    return found


def ten_patterns(sites: list[str], steps: int) -> Schedule:
    """Ten distinct rows, of which the first computes all, then the last nine of them in turn."""
    generator = np.random.default_rng(0)
    rows = generator.random((10, len(sites))) < 0.5
    rows[0] = True
    order = [0] + [1 + step % 9 for step in range(steps - 1)]
    return Schedule.from_array(rows[order], sites=sites)
