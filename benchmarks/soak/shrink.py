"""Removes from a faulty world what its fault does not need: earlier runs first, then what happens in each run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.soak.drive import Fault
from benchmarks.soak.pair import Pair
from benchmarks.soak.world import Run, World


def shrunk(fault: Fault) -> World:
    """The smallest world found whose last run has a fault of the same kind; not for worlds of concurrent runs."""
    world = replace(fault.world, runs=fault.world.runs[: fault.run + 1])
    what = fault.what.partition(":")[0]
    last = world.runs[-1:]
    if _shows(replace(world, runs=last), what):
        world = replace(world, runs=last)
    smaller: World | None = world
    while smaller is not None:
        world = smaller
        smaller = next((one for one in _smaller(world) if _shows(one, what)), None)
    return world


def _shows(world: World, what: str) -> bool:
    """True if the last run has this kind of fault, and no earlier run has any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = Pair(world)
        try:
            found = [pair.fault(run) for run in world.runs]
        finally:
            pair.close()
    return not any(found[:-1]) and (found[-1] or "").startswith(what)


def _smaller(world: World) -> Iterator[World]:
    for index in range(len(world.runs) - 1):
        yield replace(world, runs=world.runs[:index] + world.runs[index + 1 :])
    for index, run in enumerate(world.runs):
        for simpler in _simpler(run):
            yield replace(world, runs=(*world.runs[:index], simpler, *world.runs[index + 1 :]))
    if world.lowering != "plain":
        yield replace(world, lowering="plain")


def _simpler(run: Run) -> Iterator[Run]:
    for name in ("state", "before", "events"):
        parts = getattr(run, name)
        for index in range(len(parts)):
            yield replace(run, **{name: parts[:index] + parts[index + 1 :]})
    for name, least in (("guided", False), ("batch", 1), ("size", 0), ("first", 0), ("prompt", 0)):
        if getattr(run.request, name) != least:
            simpler: dict[str, Any] = {name: least}
            yield replace(run, request=replace(run.request, **simpler))
    if run.parameters:
        yield replace(run, parameters=0)
