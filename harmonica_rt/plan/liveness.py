"""Derives from a schedule what each step reads and stores, and how long each stored value lives.

A value is stored only where a later step reads it. Whether a reused site is read at all depends on the graph (its
result may feed nothing but other reused sites), and what a step reads depends on what it stores. So `analyse` finds
what is read, drops what is stored but never read, and repeats this until there is nothing to drop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.capture.captured_graph import CapturedGraph
from harmonica_rt.indices import SiteIndex, SiteOutput, StepIndex
from harmonica_rt.plan.histories import histories
from harmonica_rt.plan.specialise import Pattern, live_reads
from harmonica_rt.schedule import Schedule


@dataclass(frozen=True)
class Lifetime:
    """One stored value: written in step `first`, read in later steps, for the last time in step `last`."""

    output: SiteOutput
    first: StepIndex
    last: StepIndex


def analyse(captured: CapturedGraph, schedule: Schedule) -> tuple[list[Pattern], list[Lifetime]]:
    """The pattern of each step of a schedule, and all stored values in order of step and site."""
    history = histories(schedule)
    reuse = [frozenset(SiteIndex(int(i)) for i in np.flatnonzero(~row)) for row in schedule.compute]
    taken = [frozenset((site, history.values(site)) for site in sites if history.taken[site]) for sites in reuse]
    stored = _stores_by_site(captured, schedule.compute)
    while True:
        patterns = [
            Pattern(sites, frozenset(outputs), values)
            for sites, outputs, values in zip(reuse, stored, taken, strict=True)
        ]
        reads = {pattern: live_reads(captured, pattern) for pattern in dict.fromkeys(patterns)}
        last: dict[tuple[SiteOutput, int], int] = {}
        for step, pattern in enumerate(patterns):
            for output in reads[pattern]:
                for age in range(history.values(output.site)):
                    last[output, history.source(StepIndex(step), output.site, age)] = step
        unread = [{output for output in outputs if (output, step) not in last} for step, outputs in enumerate(stored)]
        if not any(unread):
            break
        stored = [outputs - dead for outputs, dead in zip(stored, unread, strict=True)]
    lifetimes = [
        Lifetime(output, StepIndex(step), StepIndex(last[output, step]))
        for step, outputs in enumerate(stored)
        for output in sorted(outputs)
    ]
    return patterns, lifetimes


def _stores_by_site(captured: CapturedGraph, compute: NDArray[np.bool_]) -> list[set[SiteOutput]]:
    """For each step, all outputs of the sites that this step computes and a later step reuses."""
    reused_later = np.logical_or.accumulate(~compute[::-1], axis=0)[::-1]
    return [
        {
            SiteOutput(SiteIndex(int(site)), index)
            for site in np.flatnonzero(row)
            for index in range(len(captured.outputs_of(SiteIndex(int(site)))))
        }
        for row in compute & reused_later
    ]
