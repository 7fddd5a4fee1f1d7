"""What a provider is: a name, when it applies, and a runner for a case under a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch

from benchmarks.latency.cases import Task
from harmonica_rt.graph.flops import flop_counter

Role = Literal["uncached", "peer", "hooks", "ours"]
"""`hooks` and `ours` follow the schedule exactly and are held against the reference; a peer approximates otherwise."""


class Runner:
    """A provider at work on one task: runs whole denoising loops, or one step after the other.

    Args:
        task: what to run.
        denoise: called like the model.

    Attributes:
        computes: whether each step computes everything; all do, unless a subclass says otherwise.
    """

    def __init__(self, task: Task, denoise: Callable[..., Any]) -> None:
        self.task = task
        self.computes: tuple[bool, ...] = (True,) * task.case.steps
        self._denoise = denoise

    def reset(self) -> None:
        """The next step is step 0 of another run."""

    def step(self, index: int) -> Any:
        """Run one step; they come in order."""
        return self._denoise(**self.task.case.calls[index])

    @torch.no_grad()
    def run(self) -> Any:
        """One whole run; the output of its last step."""
        self.reset()
        output = None
        for index in range(self.task.case.steps):
            output = self.step(index)
        return output

    def theory(self) -> float:
        """FLOPs of an uncached run / FLOPs of a run of this one."""
        return 1.0

    def close(self) -> None:
        """Leave the modules as they were."""


class Provider(Protocol):
    """One way to run a task."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def role(self) -> Role:
        """What is demanded of it."""

    def applies(self, task: Task) -> str | None:
        """None, or why not."""

    def prepare(self, task: Task) -> Runner:
        """A runner; it compiles at its first run, if it does."""


class CountedRunner(Runner):
    """A runner whose every product is an eager operator, so that its FLOPs can be counted as it runs."""

    def theory(self) -> float:
        """Counted."""
        return self.task.plan.full_flops * self.task.case.steps / _counted(self.run)

    @torch.no_grad()
    def step_flops(self, index: int) -> int:
        """FLOPs of the next step, which is `index`; it is run."""
        return _counted(lambda: self.step(index))


def fewest_computed(full: int, partial: int, steps: int, limit: float) -> int:
    """The fewest steps to compute so that the theoretical speed-up is at most `limit`; at least 1.

    Args:
        full: FLOPs of a step that computes everything.
        partial: FLOPs of any other step.
        steps: of a run.
        limit: theoretical speed-up not to go above.
    """
    for computed in range(1, steps):
        if full * steps <= limit * (1 + 1e-9) * (computed * full + (steps - computed) * partial):
            return computed
    return steps


def evenly(computed: int, steps: int) -> tuple[bool, ...]:
    """A step mask with `computed` of `steps` True, spread evenly, the first among them."""
    chosen = {index * steps // computed for index in range(computed)}
    return tuple(step in chosen for step in range(steps))


def mask_within(task: Task, partial: int) -> tuple[bool, ...]:
    """The step mask whose theoretical speed-up is closest to the schedule's, and not above it."""
    steps = task.case.steps
    return evenly(fewest_computed(task.plan.full_flops, partial, steps, task.theory), steps)


def probe(runner: CountedRunner) -> int:
    """FLOPs of a step that does not compute everything: of the second, under a mask that computes the first alone."""
    runner.reset()
    runner.step_flops(0)
    return runner.step_flops(1)


def one_of(steps: int) -> tuple[bool, ...]:
    """The mask that computes the first step alone."""
    return evenly(1, steps)


def as_bits(mask: Sequence[bool]) -> list[int]:
    """1 = compute."""
    return [int(computed) for computed in mask]


def _counted(function: Callable[[], object]) -> int:
    counter = flop_counter()
    with counter:
        function()
    return int(counter.get_total_flops())
