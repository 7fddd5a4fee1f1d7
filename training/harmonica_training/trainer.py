"""Trains a router and turns it into a schedule: one loop for every objective, in one process or several."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_rt.errors import HarmonicaError
from harmonica_rt.schedule import MadeBy, Schedule
from harmonica_rt.untrusted.text import described, one_line, quoted
from harmonica_training import distributed
from harmonica_training.cached_forward import frozen
from harmonica_training.checkpoint import Checkpoint, TrainingInterrupted, file_name, latest_checkpoint, save_checkpoint
from harmonica_training.conditions import Conditions
from harmonica_training.config import TrainConfig
from harmonica_training.errors import CheckpointError, DivergenceError, TrainingError
from harmonica_training.harmonica import HarmoniCa, Objective
from harmonica_training.progress import IterationRecord, Progress, Silent
from harmonica_training.router import Router, logit
from harmonica_training.sdt import Walked
from harmonica_training.setting import Setting
from harmonica_training.settling import Settling
from harmonica_training.target import Steering, Target
from harmonica_training.validation import Validation

DIVERGED = 10.0  # error of the prediction, relative to its mean square, above which nothing more is learned
LAST_RATE = 0.1  # fraction of the learning rate that is left at the end of its decay
FP16_SCALE = 1024.0  # loss scale in half precision
SHOW_EVERY = 10  # iterations between images of the schedule
FAILED = -1  # reported as the iteration of a process that could not resume from its checkpoint


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        schedule: the schedule, with a record of how it was made.
        scores: r, `[steps, sites]`.
        speedup: theoretical speed-up of the schedule, FLOPs of the uncached model / FLOPs left.
        beta: beta at the end.
        history: one record per iteration that this process ran.
    """

    schedule: Schedule
    scores: NDArray[np.float64]
    speedup: float
    beta: float
    history: tuple[IterationRecord, ...]


def train(
    pipeline: Any,
    config: TrainConfig,
    *,
    conditions: Conditions | None = None,
    start: Schedule | None = None,
    directory: str | Path | None = None,
    progress: Progress | None = None,
    objective: Callable[[Setting], Objective] = HarmoniCa,
) -> TrainingResult:
    """Learn a cache schedule for `pipeline`.

    Under `torchrun`, every process calls this with a pipeline on its own device. Each walks its share of the batch, and
    all return the same schedule.

    Args:
        pipeline: a diffusers pipeline; its weights are not changed.
        config: how to train.
        conditions: what to generate; by default all class labels that the pipeline knows.
        start: a schedule to start from: its scores, or else its mask.
        directory: where checkpoints are kept. A training that finds its own there resumes from the newest.
        progress: notified of each iteration, in the first process.
        objective: makes the objective to learn from.

    Raises:
        TrainingError: the config does not fit the pipeline, a target cannot be reached, or the processes do not start
            from the same state.
        CheckpointError: a checkpoint in `directory` is damaged, or holds numbers that are not finite.
        DivergenceError: the error is not finite, or grew out of bounds.
        TrainingInterrupted: a KeyboardInterrupt ended it; a checkpoint of the last finished iteration was written.
    """
    if not isinstance(config, TrainConfig):
        raise TrainingError(f"config: expected a TrainConfig, got {described(config)}")
    if directory is not None and not isinstance(directory, str | os.PathLike):
        raise TrainingError(f"directory: expected a path, got {described(directory)}")
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        raise TrainingError(f"directory: {os.fspath(directory)} is a file")
    distributed.join()
    setting = Setting(pipeline, config, conditions)
    training = _Training(setting, objective(setting), start)
    checkpoints = None if directory is None else Path(directory)
    training.resume(checkpoints)
    shown = progress if progress is not None and distributed.rank() == 0 else Silent()
    history = []
    try:
        try:
            shown.begin(config.iterations, training.iteration)
            with frozen(setting.model):
                while training.iteration < config.iterations:
                    history.append(training.step())
                    training.keep()
                    training.tell(history[-1], shown)  # after keep(), so that it can no longer be lost
                    if checkpoints is not None and training.iteration % config.checkpoint_every == 0:
                        training.save(checkpoints)
        finally:
            shown.end()
        if checkpoints is not None:
            training.save(checkpoints)
        return training.result(tuple(history))
    except KeyboardInterrupt as stop:  # at any instruction: only the state that was kept last is valid
        raise training.interrupted(checkpoints) from stop


class _Training:
    """The state of a training: router, optimiser, beta, lambda."""

    def __init__(self, setting: Setting, objective: Objective, start: Schedule | None) -> None:
        config = setting.config
        self.iteration = 0
        self._setting = setting
        self._config = config
        self._objective = objective
        router = Router(
            setting.steps,
            setting.sites,
            initial=config.initial,
            spread=config.spread,
            coherence=config.coherence,
            seed=config.seed,
            free=objective.free,
        )
        self._router = router.to(setting.device)
        if start is not None:
            self._router.start_from(start, config.tau)
        self._optimizer = torch.optim.AdamW(self._router.parameters(), lr=config.learning_rate, weight_decay=0.0)
        self._target = Target(config, setting.costs, objective.free)
        self._steering = Steering(self._target, config, (setting.steps, len(setting.sites)))
        self._settling = Settling(Validation(setting), objective.free, config.exchanges)
        # soft gates define no schedule before the end, and under a fixed beta the best images cost the most
        self._settles = config.gates == "hard" and config.beta is None
        self._begun = 0  # iterations done by earlier processes
        self._kept: Checkpoint | None = None
        self._stands_for: NDArray[np.bool_]  # what the last iteration left computed

    def step(self) -> IterationRecord:
        """Run one iteration."""
        started = time.perf_counter()
        config, router, steering = self._config, self._router, self._steering
        scale = FP16_SCALE if config.precision == "fp16" else 1.0
        scores = router.scores()
        computes = self._computes()
        gates = scores if config.gates == "soft" else torch.from_numpy(computes).to(scores)
        walked = self._objective.walk(self.iteration, gates, computes, scale)
        by_score, mse = self._checked(walked)
        steering.observe(by_score, walked.drawn, router.free, computes)
        penalty = steering.penalty().to(by_score)
        router.set_gradient(by_score + penalty, walked.drawn)
        rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        router.clamp()
        steering.follow(router.logits, rate, router.free)
        self.iteration += 1
        self._stands_for = computes = self._computes()
        if self._settles:
            self._settling.follow(self.iteration, computes, router.logits)
        cost = float((scores[walked.drawn] * penalty).sum())
        error = float((mse * self._objective.weights).sum())
        return IterationRecord(
            iteration=self.iteration,
            loss=error + cost,
            mse=float(mse[walked.drawn].mean()),
            penalty=cost,
            beta=steering.beta or 0.0,
            cur=1.0 - float(computes.mean()),
            speedup=self._setting.costs.speedup(computes),
            seconds=time.perf_counter() - started,
        )

    def tell(self, record: IterationRecord, progress: Progress) -> None:
        """Report the iteration that has just finished."""
        if self._objective.renewed:
            progress.renewed(self.iteration, self._objective.weights.tolist())
        progress.iteration(record)
        if self.iteration % SHOW_EVERY == 0 or self.iteration == self._config.iterations:
            progress.schedule(self.iteration, self._router.scores().double().cpu().numpy(), self._stands_for)

    def _computes(self) -> NDArray[np.bool_]:
        """The current mask: r > tau; with hard gates and a target, tau is the threshold that meets the target."""
        config = self._config
        if config.gates == "soft":
            return self._router.computes(config.tau)
        mask, threshold = self._land()
        self._router.shift(logit(config.tau) - logit(threshold))
        return mask

    def _land(self) -> tuple[NDArray[np.bool_], float]:
        scores = self._router.scores().double().cpu().numpy()
        return self._target.land(scores, self._steering.prices.double().numpy(), self._config.tau)

    def result(self, history: tuple[IterationRecord, ...]) -> TrainingResult:
        """The result: the router's schedule now, or when its images were best, on its target."""
        config, setting = self._config, self._setting
        mask, threshold = self._land()
        best = self._settling.best
        if best is not None:
            self._router.load(best.logits)
            mask, threshold = best.computes, config.tau
        scores = self._router.scores().double().cpu().numpy()
        free = self._router.free
        logits = [row.tolist() if may else None for row, may in zip(self._router.logits, free, strict=True)]
        record = {
            **config.plain(),
            "conditions": setting.conditions.describe(),
            "processes": distributed.world(),
            "final_beta": self._steering.beta,
            "validated_error": best and best.error,
        }
        made_by = MadeBy(self._objective.method, record, threshold, logits)
        schedule = Schedule.from_array(mask, setting.sites, made_by=made_by)
        return TrainingResult(
            schedule=setting.describe(schedule),
            scores=scores,
            speedup=setting.costs.speedup(mask),
            beta=self._steering.beta or 0.0,
            history=history,
        )

    def save(self, directory: Path) -> None:
        """Write a checkpoint, from the first process."""
        if distributed.rank() == 0:
            save_checkpoint(directory, Checkpoint(self.iteration, self._tensors(), self._values()))
        distributed.wait()

    def keep(self) -> None:
        """Remember the state after an iteration, since an interruption leaves the next one half done."""
        tensors = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        self._kept = Checkpoint(self.iteration, tensors, self._values())

    def interrupted(self, directory: Path | None) -> TrainingInterrupted:
        """The exception for an interruption. The first process writes the kept state without waiting for the others."""
        kept, path = self._kept, None
        if kept is not None and directory is not None and distributed.rank() == 0:
            path = save_checkpoint(directory, kept)
        return TrainingInterrupted(kept.iteration if kept else self._begun, kept, path)

    def resume(self, directory: Path | None) -> None:
        """Resume from the newest checkpoint in `directory`, if there is one; all processes from the same state.

        Raises:
            CheckpointError: it is damaged, or holds numbers that are not finite.
            TrainingError: it comes from a training with another config or model, or the processes do not have the same
                state; in the latter case each of them raises.
        """
        failure: HarmonicaError | None = None
        if directory is not None:
            try:
                self._go_on_from(directory)
            except HarmonicaError as error:  # raised below, once all processes know
                failure = error
        stands = self.iteration if failure is None else FAILED
        state = Checkpoint(
            self.iteration, self._tensors(), {**self._values(), "keeps checkpoints": directory is not None}
        )
        everyone = distributed.gather([stands, state.digest()], self._setting.device)
        if failure is not None:
            raise failure
        if any(one != everyone[0] for one in everyone):
            places = (f"process {rank} {_place(*one)}" for rank, one in enumerate(everyone))
            raise TrainingError(
                f"the processes do not begin alike: {', '.join(places)}; give all of them the same directory of "
                f"checkpoints, config, conditions and schedule to start from"
            )

    def _go_on_from(self, directory: Path) -> None:
        found = latest_checkpoint(directory)
        if found is None:
            return
        path = directory / file_name(found.iteration)
        values = self._values()
        for name in ("identity", "steering", "settling"):
            if name not in found.values:
                raise TrainingError(f"the checkpoint {path} has no {name}; give another directory")
        identity, here = found.values["identity"], values["identity"]
        if identity != here:
            raise TrainingError(
                f"{path} is a checkpoint of another training: {_differences(identity, here)}. Give another "
                f"directory, or remove it"
            )
        try:
            self._take_over(found)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is damaged: {error}; delete it, and go on from the one before it") from error

    def _take_over(self, found: Checkpoint) -> None:
        here = self._tensors()
        logits = found.tensor("logits", here["logits"])
        self.iteration = self._begun = found.iteration
        self._router.load(logits)
        self._steering.load(found.values["steering"], found.tensor("prices", here["prices"]))
        self._objective.weights = found.tensor("lambda", here["lambda"]).to(self._setting.device)
        best = {"best.computes": torch.zeros(logits.shape, dtype=torch.bool), "best.logits": logits}
        kept = {name: found.tensor(name, like) for name, like in best.items() if name in found.tensors}
        self._settling.load(kept, found.values["settling"])
        for index, row in enumerate(self._router.rows):
            if f"moment.{index}" in found.tensors or f"count.{index}" in found.tensors:
                moments = found.tensor(f"moment.{index}", torch.stack([row, row])).to(row)
                count = found.tensor(f"count.{index}", torch.tensor(0.0))
                if count < 1 or bool((moments[1] < 0).any()):
                    raise CheckpointError(f"moment.{index} or count.{index} is no moment or count of an optimiser")
                self._optimizer.state[row] = {
                    "step": count.clone(),
                    "exp_avg": moments[0].clone(),
                    "exp_avg_sq": moments[1].clone(),
                }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"logits": self._router.logits, "prices": self._steering.prices, "lambda": self._objective.weights}
        tensors |= self._settling.tensors()
        for index, row in enumerate(self._router.rows):
            state = self._optimizer.state.get(row)
            if state:
                tensors[f"moment.{index}"] = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
                tensors[f"count.{index}"] = state["step"]
        return tensors

    def _values(self) -> dict[str, object]:
        return {"identity": self._identity, "steering": self._steering.state(), "settling": self._settling.values()}

    @cached_property
    def _identity(self) -> dict[str, object]:
        """What distinguishes this training from others, as plain JSON; cached, since hashing conditions may be slow."""
        config = self._config.plain()
        for name in ("iterations", "checkpoint_every"):  # a training may be extended
            del config[name]
        info = self._setting.describe(Schedule.all_compute(steps=self._setting.steps, sites=self._setting.sites))
        identity = {
            "method": self._objective.method,
            "config": config,
            "model": [info.model.class_name, info.model.config_fingerprint] if info.model else None,
            "conditions": self._setting.conditions.describe(),
        }
        plain: dict[str, object] = json.loads(json.dumps(identity))
        return plain

    def _checked(self, walked: Walked) -> tuple[Tensor, Tensor]:
        """Gradient and errors, averaged over all processes; DivergenceError if they are not usable."""
        by_score, mse, power = (distributed.mean(part) for part in (walked.by_score, walked.mse, walked.power))
        if not bool(by_score.isfinite().all()) or not bool(mse.isfinite().all()):
            step = int((~mse.isfinite()).nonzero()[0]) if not bool(mse.isfinite().all()) else None
            where = "its gradient" if step is None else f"the error of step {step}"
            hint = "bf16 has the range of fp32" if self._config.precision == "fp16" else "look at the model's outputs"
            raise DivergenceError(f"iteration {self.iteration}: {where} is not finite; {hint}")
        relative = float(mse.sum() / power.sum().clamp(min=torch.finfo(torch.float64).tiny))
        if relative > DIVERGED:
            raise DivergenceError(
                f"iteration {self.iteration}: under cache the prediction is off by {relative:.3g} times its own mean "
                f"square; lower the target or beta, or the learning rate"
            )
        return by_score, mse

    def _learning_rate(self) -> float:
        config = self._config
        decaying = round(config.iterations * config.decay)
        done = self.iteration - (config.iterations - decaying)
        if decaying == 0 or done <= 0:
            return config.learning_rate
        cosine = 0.5 * (1 + math.cos(math.pi * done / decaying))
        return config.learning_rate * (LAST_RATE + (1 - LAST_RATE) * cosine)


def _place(iteration: int, digest: int) -> str:
    return "cannot go on" if iteration == FAILED else f"at iteration {iteration} (state {digest:016x})"


def _differences(found: object, here: object) -> str:
    """A description of the entries in which two identities differ."""
    if not isinstance(found, dict) or not isinstance(here, dict):
        return f"{quoted(found)} there, {quoted(here)} here"
    names = [name for name in {**found, **here} if found.get(name) != here.get(name)]
    return "; ".join(f"{one_line(name)}: {_differences(found.get(name), here.get(name))}" for name in names)
