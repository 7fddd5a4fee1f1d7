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
from harmonica_rt.plan.specialise import Pattern, live_reads


@dataclass(frozen=True)
class Lifetime:
    """One stored value: written in step `first`, read in later steps, for the last time in step `last`."""

    output: SiteOutput
    first: StepIndex
    last: StepIndex


def analyse(captured: CapturedGraph, compute: NDArray[np.bool_]) -> tuple[list[Pattern], list[Lifetime]]:
    """The pattern of each step of a `[steps, sites]` schedule, and all stored values in order of step and site."""
    source = sources(compute)
    reuse = [frozenset(SiteIndex(int(i)) for i in np.flatnonzero(~row)) for row in compute]
    stored = _stores_by_site(captured, compute)
    while True:
        patterns = [Pattern(sites, frozenset(outputs)) for sites, outputs in zip(reuse, stored, strict=True)]
        reads = {pattern: live_reads(captured, pattern) for pattern in dict.fromkeys(patterns)}
        last: dict[tuple[SiteOutput, int], int] = {}
        for step, pattern in enumerate(patterns):
            for output in reads[pattern]:
                last[output, int(source[step, output.site])] = step
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


def sources(compute: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`[steps, sites]`: the step that computed the value a site has in each step (that step itself if computed)."""
    steps = np.where(compute, np.arange(len(compute))[:, None], 0)
    return np.maximum.accumulate(steps, axis=0).astype(np.int64)


def _stores_by_site(captured: CapturedGraph, compute: NDArray[np.bool_]) -> list[set[SiteOutput]]:
    """For each step, all outputs of the sites that this step computes and the next step reuses."""
    reused_next = np.vstack([~compute[1:], np.zeros((1, compute.shape[1]), bool)])
    return [
        {
            SiteOutput(SiteIndex(int(site)), index)
            for site in np.flatnonzero(row)
            for index in range(len(captured.outputs_of(SiteIndex(int(site)))))
        }
        for row in compute & reused_next
    ]
