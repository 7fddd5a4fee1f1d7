"""harmonica-rt with each of its lowerings and as a backend of torch.compile, driven by a scheduler as in a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import harmonica_rt as hrt
from benchmarks.latency.cases import Task
from benchmarks.latency.providers.base import Role, Runner
from harmonica_rt.options import LOWERINGS


class MarkingScheduler:
    """A scheduler that only marks where runs and steps begin."""

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)

    def set_timesteps(self, steps: int) -> None:
        """Begin a run of `steps` steps."""
        self.timesteps = torch.arange(steps, 0, -1)

    def step(self, output: Any, timestep: Any) -> Any:
        """End a step."""
        return output


class Loop:
    """The least that harmonica-rt accepts as a pipeline: a denoiser and the scheduler that drives it."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.scheduler = MarkingScheduler()

    def __call__(self) -> None:
        """Always raise: `LoopRunner` calls denoiser and scheduler itself."""
        raise TypeError("this pipeline is run step by step; see LoopRunner")


class LoopRunner(Runner):
    """Runs the denoiser of a loop and steps its scheduler."""

    def __init__(self, task: Task, loop: Loop) -> None:
        super().__init__(task, loop.transformer)
        self.computes = tuple(bool(row.all()) for row in task.schedule.compute)
        self.loop = loop

    def reset(self) -> None:
        """See `Runner.reset`."""
        self.loop.scheduler.set_timesteps(self.task.case.steps)

    def step(self, index: int) -> Any:
        """See `Runner.step`."""
        scheduler = self.loop.scheduler
        return scheduler.step(super().step(index), scheduler.timesteps[index])

    def theory(self) -> float:
        """The theoretical speed-up of the plan; the prologue is not subtracted."""
        return self.task.theory

    def close(self) -> None:
        """See `Runner.close`."""
        hrt.uncompile(self.loop)


@dataclass(frozen=True)
class Lowered:
    """`harmonica_rt.compile` with one lowering."""

    lowering: str
    role: Role = "ours"

    @property
    def name(self) -> str:
        """See `Provider.name`."""
        return f"harmonica-rt, {self.lowering}"

    def applies(self, task: Task) -> str | None:
        """None if this lowering exists."""
        return None if self.lowering in LOWERINGS else f"there is no lowering {self.lowering!r}"

    def prepare(self, task: Task) -> Runner:
        """The model compiled in its loop. If it cannot be captured, an error is raised; there is no fallback."""
        return LoopRunner(task, hrt.compile(Loop(task.case.tree()), task.schedule, lowering=self.lowering, strict=True))


@dataclass(frozen=True)
class Backend:
    """`torch.compile(model, backend="harmonica")`."""

    name: str = "harmonica-rt, torch.compile backend"
    role: Role = "ours"

    def applies(self, task: Task) -> str | None:
        """None if the backend is registered."""
        if "harmonica" not in torch._dynamo.list_backends() or not hasattr(hrt, "attach"):
            return "the backend is not registered; install harmonica-rt to register it"
        return None

    def prepare(self, task: Task) -> Runner:
        """The model compiled in place, in a loop whose scheduler begins its runs."""
        model = task.case.tree()
        model.compile(backend="harmonica", options={"schedule": task.schedule})
        loop = Loop(model)
        hrt.attach(loop)
        return BackendRunner(task, loop)


class BackendRunner(LoopRunner):
    """A loop whose model was compiled in place by torch.compile."""

    def close(self) -> None:
        """See `Runner.close`."""
        hrt.attach(self.loop.transformer).detach()
        del self.loop.transformer._compiled_call_impl
