"""One side of a world: puts a pipeline into a run's state and samples it; events happen between its steps."""

from __future__ import annotations

import gc
from collections.abc import Hashable
from typing import Any

import torch

from benchmarks.soak.outcome import Outcome
from benchmarks.soak.subject import Controls
from benchmarks.soak.subjects import SUBJECTS
from benchmarks.soak.world import Event, Run, World


class Interrupted(Exception):
    """Raised by a callback of the soak."""


class Side:
    """A pipeline, and the value of each change made to its denoiser."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.subject = SUBJECTS[world.subject]
        self.pipeline = self.subject.build(world.seed, world.variant, world.sampler)
        self._values: dict[str, int] = {}
        made = {event.name for run in world.runs for event in run.events if event.kind == "change"}
        self._shared = {name for name in made if self.subject.changes[name].shared}
        for name in sorted({*made, *(name for run in world.runs for name, _ in run.state)} - self._shared):
            change = self.subject.changes[name]
            # the objects that a change keeps are made now, from the parameters that both sides have
            for value in (*range(1, change.values), 0):
                change.set(self.pipeline, value)
        self._parameters = {name: p.detach().clone() for name, p in self.pipeline.transformer.named_parameters()}
        self._scale = 0

    def state(self) -> Hashable:
        """What the forward of the denoiser depends on, besides the values of its parameters."""
        changes = self.subject.changes
        return tuple(sorted((n, v) for n, v in self._values.items() if v and not changes[n].around))

    def set(self, name: str, value: int) -> None:
        """Set one change to a value."""
        change = self.subject.changes[name]
        if change.shared or self._values.get(name, 0) != value:
            change.set(self.pipeline, value)
        self._values[name] = value

    def prepare(self, run: Run) -> None:
        """Set the state in which the run starts; the other side may have left classes and modules changed."""
        wanted = dict(run.state)
        for name in sorted({*self._values, *wanted, *self._shared}):
            self.set(name, wanted.get(name, 0))
        if run.parameters != self._scale:
            self._scale = run.parameters
            with torch.no_grad():
                for name, parameter in self.pipeline.transformer.named_parameters():
                    if name in self._parameters:
                        parameter.copy_(self._parameters[name] * (1.0, 0.8, 1.1)[run.parameters])

    def restore(self) -> None:
        """Undo every change, also to classes and modules."""
        for name in self._values:
            self.set(name, 0)

    def another_scheduler(self) -> None:
        """Replace the scheduler by a new one with the same configuration."""
        scheduler = self.pipeline.scheduler
        self.pipeline.scheduler = type(scheduler).from_config(scheduler.config)

    def before(self, kind: str, run: Run, outcome: Outcome) -> None:
        """Do what happens right before a run, on this side."""
        if kind == "another scheduler":
            self.another_scheduler()
        elif kind in ("outside", "gradient"):
            outcome.outside += self.call_from_outside(run.request.seed, with_gradient=kind == "gradient")
        elif kind == "collect":
            gc.collect()

    def sample(self, run: Run) -> Outcome:
        """Sample one run; its errors are raised, except for the one that the soak's callback raises."""
        outcome = Outcome()
        for kind in run.before:
            self.before(kind, run, outcome)

        def on_step_end(index: int, latents: torch.Tensor, controls: Controls) -> None:
            outcome.latents.append(latents.clone())
            for event in run.events:
                if event.after == index:
                    self._happen(event, run, controls, outcome)

        try:
            outcome.result = self.subject.sample(self.pipeline, run.request, self.world.inference_steps, on_step_end)
        except Interrupted:
            outcome.interrupted = True
        return outcome

    def _happen(self, event: Event, run: Run, controls: Controls, outcome: Outcome) -> None:
        if event.kind == "change":
            self.set(event.name, event.value)
        elif event.kind in ("prompt", "prompt in place"):
            controls.prompt(event.value, in_place=event.kind == "prompt in place")
        elif event.kind == "guidance":
            if run.request.guided:
                controls.guidance_off()
        elif event.kind == "raise":
            raise Interrupted
        elif event.kind == "stop":
            controls.stop()
        elif event.kind == "collect":
            gc.collect()
        else:
            seed = run.request.seed + event.after + 1
            outcome.outside += self.call_from_outside(seed, with_gradient=event.kind == "gradient")

    def call_from_outside(self, seed: int, *, with_gradient: bool) -> list[torch.Tensor]:
        """Call the denoiser outside any run.

        Returns:
            the output; with `with_gradient` also the gradients with respect to the latents and to one parameter.
        """
        call = self.subject.arguments(self.pipeline, seed)
        model = self.pipeline.transformer
        with torch.set_grad_enabled(with_gradient):
            latents = call["hidden_states"].requires_grad_(with_gradient)
            parameter = next(p for p in model.parameters() if p.requires_grad)
            output = _tensor(model(**call))
            if not with_gradient:
                return [output.clone()]
            if not output.requires_grad:  # the graph was cut: zeros stand in, which differ from the right gradients
                return [output, torch.zeros_like(latents), torch.zeros_like(parameter)]
            grads = torch.autograd.grad(output.square().sum(), [latents, parameter])
        return [output.detach(), *grads]


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output.sample if hasattr(output, "sample") else output
    return found
