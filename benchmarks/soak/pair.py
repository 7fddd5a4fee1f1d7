"""Runs both sides of a world, and says what is wrong with the compiled one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch._dynamo as dynamo

from benchmarks.soak.compiled import Compiled
from benchmarks.soak.outcome import Outcome, given_or_raised
from benchmarks.soak.plain import Plain
from benchmarks.soak.random_world import random_schedule
from benchmarks.soak.world import Run, World
from harmonica_rt.errors import HarmonicaError, Obstacle

HOOKED = Obstacle.HOOKS.value  # documented: such a model runs eagerly
ROUNDING = 1e-4  # relative to the largest value; a wrong image is off by 1e-3 and more
ROUNDINGS = 8  # limit in one call of a model, in multiples of what `Oracle.perturbs_outputs` changes


class Pair:
    """Both sides of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.schedule = random_schedule(world)
        self.plain, self.compiled = Plain(world, self.schedule), Compiled(world, self.schedule)

    def fault(self, run: Run) -> str | None:
        """Run it on both sides; returns what is wrong with the compiled one, None if nothing is."""
        found = given_or_raised(lambda: self.got(run))
        what = self.judged(self.expected(run), found, run)
        if what is None or self.world.interface != "torch.compile":
            return what
        # documented: dynamo decides when to make another graph, whose first step is computed in full
        try:
            counts = found().counts
        except Exception:  # already described by `what`
            return what
        self.plain.oracle.forced_in_full = Counter(counts.in_full if counts is not None else ())
        try:
            return self.judged(self.expected(run), found, run)
        finally:
            self.plain.oracle.forced_in_full = Counter()

    def expected(self, run: Run) -> Outcome:
        """Outcome of the plain side."""
        self.plain.prepare(run)
        return self.plain.sample(run)

    def got(self, run: Run) -> Outcome:
        """Outcome of the compiled side."""
        self.compiled.prepare(run)
        return self.compiled.sample(run)

    def judged(self, expected: Outcome, got: Callable[[], Outcome], run: Run) -> str | None:
        """What is wrong with what `got` returns or raises; None if nothing is."""
        try:
            return self.difference(expected, got(), run)
        except KeyboardInterrupt:
            if run.interrupted_at:
                return None  # the next run shows what it left behind
            raise
        except HarmonicaError as error:
            # If the last run was interrupted before its scheduler was seen, a call from outside looks like its first.
            unseen = self.compiled.after_interruption and "requires a gradient" in str(error)
            if run.interrupted_at or unseen:
                return None
            return f"refused: {type(error).__name__}: {error}"
        except Exception as error:
            # documented: behind torch.compile there is no eager fallback, and dynamo's error contains ours
            hooked = HOOKED in str(error) or "a forward hook on the model" in str(error)
            if run.interrupted_at or (self.world.interface == "torch.compile" and hooked):
                return None
            return f"undocumented error: {type(error).__name__}: {error}"

    def difference(self, expected: Outcome, got: Outcome, run: Run) -> str | None:
        """What is wrong with `got`; None if nothing is."""
        for index, (a, b) in enumerate(zip(expected.latents, got.latents, strict=False)):
            if not self.same(a, b) and not self._is_rounding(run, index, a, b):
                return f"wrong image: after step {index}, {_distance(a, b)}, {_counted(expected, got)}"
        if len(expected.latents) != len(got.latents) or expected.interrupted != got.interrupted:
            return f"wrong image: {len(got.latents)} steps instead of {len(expected.latents)}"
        if expected.result is not None and got.result is not None and not self.same(expected.result, got.result):
            return f"wrong image: the last one, {_distance(expected.result, got.result)}"
        for index, (a, b) in enumerate(zip(expected.outside, got.outside, strict=True)):
            if not self.same(a, b):
                return f"wrong call from outside: value {index}, {_distance(a, b)}"
        disturbed = expected.interrupted or any(event.kind in ("outside", "gradient") for event in run.events)
        if not disturbed and got.counts is not None and got.counts != expected.counts:
            return f"other entries reused: {_counted(expected, got)}"
        unexpected = [why for why in got.fallbacks if HOOKED not in why]
        return f"not compiled: {unexpected[0]}" if unexpected else None

    def _is_rounding(self, run: Run, index: int, a: torch.Tensor, b: torch.Tensor) -> bool:
        """True if rounding explains the difference after a step, which guidance amplifies.

        The plain run is repeated with the result of each call perturbed in the last place; its distance is the measure.
        """
        if self.world.lowering == "plain":
            return False
        self.plain.oracle.perturbs_outputs = True
        try:
            other = self.expected(run).latents[index]
        finally:
            self.plain.oracle.perturbs_outputs = False
        return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDINGS * (a - other).abs().max())

    def same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """True if the bits are equal or, where the lowering rounds, if the values agree up to rounding."""
        if self.world.lowering == "plain":
            return torch.equal(a, b)
        return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING * a.abs().max().clamp(min=1e-3))

    def close(self) -> None:
        """Undo all changes to classes and modules."""
        self.plain.restore()
        self.compiled.restore()
        if self.world.interface == "torch.compile":
            dynamo.reset()


def _distance(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {list(b.shape)} instead of {list(a.shape)}"
    return f"{float((a - b).abs().max() / a.abs().max()):.1e} off"


def _counted(expected: Outcome, got: Outcome) -> str:
    return f"{got.counts} instead of {expected.counts}"
