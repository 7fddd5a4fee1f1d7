"""What a provider is: a name, a role, the tasks to which it applies, and a runner for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch

from benchmarks.latency.cases import Task
from harmonica_rt.graph.flops import flop_counter

Role = Literal["uncached", "peer", "hooks", "ours"]
"""`hooks` and `ours` follow the schedule exactly and are compared with the reference; peers approximate differently."""


class Runner:
    """Runs one task with one provider: whole denoising runs, or one step after the other.

    Args:
        task: what to run.
        denoise: called like the model.

    Attributes:
        computes: for each step, True if it computes everything; all do unless a subclass sets it.
    """

    def __init__(self, task: Task, denoise: Callable[..., Any]) -> None:
        self.task = task
        self.computes: tuple[bool, ...] = (True,) * task.case.steps
        self._denoise = denoise

    def reset(self) -> None:
        """Begin another run; the next step is step 0."""

    def step(self, index: int) -> Any:
        """Run one step; steps are run in order."""
        return self._denoise(**self.task.case.calls[index])

    @torch.no_grad()
    def run(self) -> Any:
        """Do one whole run; returns the output of its last step."""
        self.reset()
        output = None
        for index in range(self.task.case.steps):
            output = self.step(index)
        return output

    def theory(self) -> float:
        """Theoretical speed-up: FLOPs of an uncached run / FLOPs of this runner's run."""
        return 1.0

    def close(self) -> None:
        """Undo all changes to the modules."""


class Provider(Protocol):
    """One way to run a task."""

    @property
    def name(self) -> str:
        """Name to print."""

    @property
    def role(self) -> Role:
        """What the gate requires of it."""

    def applies(self, task: Task) -> str | None:
        """None if the provider can run the task, else the reason."""

    def prepare(self, task: Task) -> Runner:
        """A runner for the task. If it compiles, it does so in its first run."""


class CountedRunner(Runner):
    """A runner whose products are all eager operators, so that FLOPs can be counted while it runs."""

    def theory(self) -> float:
        """See `Runner.theory`; the FLOPs are counted in a run."""
        return self.task.plan.full_flops * self.task.case.steps / _counted(self.run)

    @torch.no_grad()
    def step_flops(self, index: int) -> int:
        """Run the next step, `index`, and return its FLOPs."""
        return _counted(lambda: self.step(index))


def fewest_computed(full: int, partial: int, steps: int, limit: float) -> int:
    """The smallest number of computed steps for which the theoretical speed-up is at most `limit`; at least 1.

    Args:
        full: FLOPs of a step that computes everything.
        partial: FLOPs of any other step.
        steps: steps per run.
        limit: largest theoretical speed-up allowed.
    """
    for computed in range(1, steps):
        if full * steps <= limit * (1 + 1e-9) * (computed * full + (steps - computed) * partial):
            return computed
    return steps


def evenly(computed: int, steps: int) -> tuple[bool, ...]:
    """A step mask in which `computed` of `steps` are True, evenly spread, starting with the first."""
    chosen = {index * steps // computed for index in range(computed)}
    return tuple(step in chosen for step in range(steps))


def mask_within(task: Task, partial: int) -> tuple[bool, ...]:
    """The step mask whose theoretical speed-up is closest to the schedule's without exceeding it.

    Args:
        task: has the schedule.
        partial: FLOPs of a step that does not compute everything.
    """
    steps = task.case.steps
    return evenly(fewest_computed(task.plan.full_flops, partial, steps, task.theory), steps)


def probe(runner: CountedRunner) -> int:
    """FLOPs of a step that does not compute everything; the runner must have the mask `first_only`."""
    runner.reset()
    runner.step_flops(0)
    return runner.step_flops(1)


def first_only(steps: int) -> tuple[bool, ...]:
    """The step mask that computes the first step only."""
    return evenly(1, steps)


def as_bits(mask: Sequence[bool]) -> list[int]:
    """The mask as numbers, 1 for a step that computes everything."""
    return [int(computed) for computed in mask]


def _counted(function: Callable[[], object]) -> int:
    counter = flop_counter()
    with counter:
        function()
    return int(counter.get_total_flops())
