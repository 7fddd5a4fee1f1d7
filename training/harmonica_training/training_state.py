"""Holds the state of a training (what is learned and what steers it), and saves and resumes it."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.schedule import Schedule
from harmonica_rt.untrusted.text import one_line, quoted
from harmonica_training import distributed
from harmonica_training.checkpoint import Checkpoint, TrainingInterrupted, file_name, latest_checkpoint, save_checkpoint
from harmonica_training.errors import CheckpointError, TrainingError
from harmonica_training.harmonica import Objective
from harmonica_training.router import Router
from harmonica_training.setting import Setting
from harmonica_training.settling import Settling
from harmonica_training.target import Steering, Target
from harmonica_training.validation import Validation

FAILED = -1  # reported as the iteration of a process that could not resume from its checkpoint


class TrainingState:
    """The state of a training: what it has learned so far.

    Args:
        setting: the pipeline with its conditions.
        objective: gives the gradients; it holds lambda.
        start: a schedule to start from; None starts from the config.

    Attributes:
        iteration: number of iterations done.
        begun: number of those done by earlier processes.
        router: the scores, with `optimizer`, which moves them.
        steering: beta and the prices of entries, for the target `steering.target`.
        settling: the best schedule so far.
    """

    def __init__(self, setting: Setting, objective: Objective, start: Schedule | None) -> None:
        config = setting.config
        self.iteration = self.begun = 0
        self.setting = setting
        self.objective = objective
        router = Router(
            setting.steps,
            setting.sites,
            initial=config.initial,
            spread=config.spread,
            coherence=config.coherence,
            seed=config.seed,
            free=objective.free,
        )
        self.router = router.to(setting.device)
        if start is not None:
            self.router.start_from(start, config.tau)
        self.optimizer = torch.optim.AdamW(self.router.parameters(), lr=config.learning_rate, weight_decay=0.0)
        target = Target(config, setting.costs, objective.free)
        self.steering = Steering(target, config, (setting.steps, len(setting.sites)))
        self.settling = Settling(Validation(setting), objective.free, config.exchanges)
        self._kept: Checkpoint | None = None

    def save(self, directory: Path) -> None:
        """Write a checkpoint, from the first process."""
        if distributed.rank() == 0:
            save_checkpoint(directory, Checkpoint(self.iteration, self.tensors(), self.values()))
        distributed.wait()

    def keep(self) -> None:
        """Remember the state after an iteration, since an interruption leaves the next one half done."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        self._kept = Checkpoint(self.iteration, tensors, self.values())

    def interrupted(self, directory: Path | None) -> TrainingInterrupted:
        """The exception for an interruption. The first process writes the kept state without waiting for the others."""
        kept, path = self._kept, None
        if kept is not None and directory is not None and distributed.rank() == 0:
            path = save_checkpoint(directory, kept)
        return TrainingInterrupted(kept.iteration if kept else self.begun, kept, path)

    def resume(self, directory: Path | None) -> None:
        """Resume from the newest checkpoint in `directory`, if there is one; all processes from the same state.

        Raises:
            CheckpointError: it is damaged, or holds numbers that are not finite.
            TrainingError: it comes from a training with another config or model, or the processes have different
                states; then each of them raises.
        """
        failure: HarmonicaError | None = None
        if directory is not None:
            try:
                self._go_on_from(directory)
            except HarmonicaError as error:  # raised below, once all processes know
                failure = error
        reached = self.iteration if failure is None else FAILED
        state = Checkpoint(
            self.iteration, self.tensors(), {**self.values(), "keeps checkpoints": directory is not None}
        )
        everyone = distributed.gather([reached, state.digest()], self.setting.device)
        if failure is not None:
            raise failure
        if any(one != everyone[0] for one in everyone):
            places = (f"process {rank} {_place(*one)}" for rank, one in enumerate(everyone))
            raise TrainingError(
                f"the processes do not start alike: {', '.join(places)}; give all of them the same directory "
                f"of checkpoints, config, conditions and schedule to start from"
            )

    def _go_on_from(self, directory: Path) -> None:
        found = latest_checkpoint(directory)
        if found is None:
            return
        path = directory / file_name(found.iteration)
        values = self.values()
        for name in ("identity", "steering", "settling"):
            if name not in found.values:
                raise TrainingError(f"the checkpoint {path} has no {name}; pass another directory")
        identity, here = found.values["identity"], values["identity"]
        if identity != here:
            raise TrainingError(
                f"{path} is a checkpoint of another training: {_differences(identity, here)}. Pass another "
                f"directory, or remove it"
            )
        try:
            self._take_over(found)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged: {error}; delete it, and resume from the one before") from error

    def _take_over(self, found: Checkpoint) -> None:
        here = self.tensors()
        logits = found.tensor("logits", here["logits"])
        self.iteration = self.begun = found.iteration
        self.router.load(logits)
        self.steering.load(found.values["steering"], found.tensor("prices", here["prices"]))
        self.objective.weights = found.tensor("lambda", here["lambda"]).to(self.setting.device)
        best = {"best.computes": torch.zeros(logits.shape, dtype=torch.bool), "best.logits": logits}
        kept = {name: found.tensor(name, like) for name, like in best.items() if name in found.tensors}
        self.settling.load(kept, found.values["settling"])
        for index, row in enumerate(self.router.rows):
            if f"moment.{index}" in found.tensors or f"count.{index}" in found.tensors:
                moments = found.tensor(f"moment.{index}", torch.stack([row, row])).to(row)
                count = found.tensor(f"count.{index}", torch.tensor(0.0))
                if count < 1 or bool((moments[1] < 0).any()):
                    raise CheckpointError(f"moment.{index} or count.{index} is not the state of an optimiser")
                self.optimizer.state[row] = {
                    "step": count.clone(),
                    "exp_avg": moments[0].clone(),
                    "exp_avg_sq": moments[1].clone(),
                }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        tensors = {"logits": self.router.logits, "prices": self.steering.prices, "lambda": self.objective.weights}
        tensors |= self.settling.tensors()
        for index, row in enumerate(self.router.rows):
            state = self.optimizer.state.get(row)
            if state:
                tensors[f"moment.{index}"] = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
                tensors[f"count.{index}"] = state["step"]
        return tensors

    def values(self) -> dict[str, object]:
        """The plain values of a checkpoint."""
        return {"identity": self._identity, "steering": self.steering.state(), "settling": self.settling.values()}

    @cached_property
    def _identity(self) -> dict[str, object]:
        """What distinguishes this training from others, as plain JSON; cached, since hashing conditions may be slow."""
        config = self.setting.config.plain()
        for name in ("iterations", "checkpoint_every"):  # a training may be extended
            del config[name]
        info = self.setting.describe(Schedule.all_compute(steps=self.setting.steps, sites=self.setting.sites))
        identity = {
            "method": self.objective.method,
            "config": config,
            "model": [info.model.class_name, info.model.config_fingerprint] if info.model else None,
            "conditions": self.setting.conditions.describe(),
        }
        plain: dict[str, object] = json.loads(json.dumps(identity))
        return plain


def _place(iteration: int, digest: int) -> str:
    return "cannot resume" if iteration == FAILED else f"at iteration {iteration} (state {digest:016x})"


def _differences(found: object, here: object) -> str:
    """A description of the entries in which two identities differ."""
    if not isinstance(found, dict) or not isinstance(here, dict):
        return f"{quoted(found)} there, {quoted(here)} here"
    names = [name for name in {**found, **here} if found.get(name) != here.get(name)]
    return "; ".join(f"{one_line(name)}: {_differences(found.get(name), here.get(name))}" for name in names)
