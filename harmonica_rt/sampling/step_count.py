"""Which step of a scheduler's run a call belongs to.

Normally the scheduler's steps are counted: `scheduler.step` ends one. Hand-written loops may step a copy of the
scheduler, integrate by themselves, or step once for each of several views, and then that count is wrong. The timestep
passed to the model reveals it: if it is that of the step before or after the counted one, steps are counted by
timesteps from there on. Not every timestep identifies a step (`steps_by_timestep`). If timesteps that identify none
change while no step ends, the count is lost, and the plain model computes the rest of the run.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from harmonica_rt.call.call import Call
from harmonica_rt.call.roles import Role, roles
from harmonica_rt.errors import RunError
from harmonica_rt.sampling.notices import Notices
from harmonica_rt.sampling.run import Run
from harmonica_rt.sampling.run_timesteps import RunSteps
from harmonica_rt.sampling.steps_by_timestep import StepsByTimestep

log = logging.getLogger(__name__)

MAX_STREAMS = 16  # per step; each has its own slots
MAX_TIMESTEPS = 4  # distinct ones in one step; fourth-order Runge-Kutta evaluates at three


class StepCount:
    """Counts the steps of one run.

    Args:
        run: the run; its first step is already set.
        steps: the steps that its scheduler is set to.
        name: the model's name, for messages.
        notices: receives a notice when steps cannot be counted.
    """

    def __init__(self, run: Run, steps: RunSteps, name: str, notices: Notices) -> None:
        self._run = run
        self._timesteps = steps.timesteps
        self._identified = StepsByTimestep(steps.timesteps, steps.training_steps) if steps.timesteps else None
        self._name = name
        self._notices = notices
        self._by_timesteps = False
        self._lost = False
        self._repeated = False  # the scheduler is stepped again with the timestep of the step before: not a new step
        self._seen: set[float] = set()  # timesteps of the calls in this step
        self._seen_in = run.step

    def admits(self, call: Call) -> bool:
        """Bring the run to the step of `call`; False if the call is in no step and must run on the plain model."""
        if self._lost:
            return False
        timestep = _timestep(call)
        at = self._identified.step_of(timestep, self._run.step) if self._identified is not None else None
        if at is None:
            self._look_for_moves(timestep)
        elif at != self._run.step and not self._moved_to(at):
            self._notices.say(
                "timestep of another step",
                "%s was called in step %d with the timestep of step %d: the plain model computed the call, and nothing "
                "of it was cached or reused",
                self._name,
                self._run.step,
                at,
            )
            return False
        if self._run.position.calls >= MAX_STREAMS:
            self._lose()
        return not self._lost

    def step_begins(self, timestep: Any) -> None:
        """The scheduler is stepped.

        Raises:
            RunError: the timestep belongs to another step.
        """
        run, timesteps = self._run, self._timesteps
        self._repeated = False
        if self._by_timesteps or self._lost or timesteps is None:
            return
        if not timesteps.belongs_to_another(timestep, run.step):
            return
        if run.position.calls == 0 and run.step > run.first:
            self._repeated = not timesteps.belongs_to_another(timestep, run.step - 1)
        if not self._repeated:
            run.failed = True
            raise RunError(
                f"step {run.step} was stepped with timestep {float(timestep):g}, which belongs to another step: this "
                "run leaves steps out, and its scheduler was not told. Where image-to-image begins at step k, call "
                "scheduler.set_begin_index(k) before the first step. If the scheduler has no set_begin_index, or a run "
                "leaves out steps later on or takes some twice, uncompile the pipeline"
            )

    def step_ends(self) -> None:
        """The scheduler was stepped; the next call is in the next step, unless steps are counted by timesteps."""
        if not self._by_timesteps and not self._lost and not self._repeated:
            self._run.advance()

    def _moved_to(self, at: int) -> bool:
        """Move the run to the adjacent step `at` if steps were miscounted; returns whether it moved."""
        run = self._run
        if at == run.step + 1 and (run.position.calls or self._by_timesteps):
            run.advance()
        elif at == run.step - 1 and not run.position.calls and not self._by_timesteps and at >= run.first:
            run.position.go_back()
        else:
            return False
        if not self._by_timesteps:
            self._by_timesteps = True
            log.info("%s: steps are counted by timesteps, not by the steps of its scheduler", self._name)
        return True

    def _look_for_moves(self, timestep: torch.Tensor | None) -> None:
        """When a call's step is unknown, look for more distinct timesteps than one step can have."""
        if timestep is None or timestep.device.type != "cpu":
            return
        if self._seen_in != self._run.step:
            self._seen, self._seen_in = set(), self._run.step
        self._seen.add(float(timestep.double().sum()))
        if len(self._seen) > MAX_TIMESTEPS:
            self._lose()

    def _lose(self) -> None:
        self._lost = True
        self._run.abandon()
        self._notices.say(
            "steps not counted",
            "%s was called again and again while its pipeline's scheduler stayed in step %d, so its steps cannot be "
            "counted: the rest of this run is uncached, and so is every run like it. To have steps counted, call "
            "set_timesteps once per run and step once per step on the pipeline's own scheduler (not on a copy of it), "
            "or compile the model itself and call it once per step, with reset() before each run",
            self._name,
            self._run.step,
        )


def _timestep(call: Call) -> torch.Tensor | None:
    for role, leaf in zip(roles(call), call.leaves, strict=True):
        if role is Role.TIMESTEP and isinstance(leaf, torch.Tensor) and leaf.numel():
            return leaf
    return None
