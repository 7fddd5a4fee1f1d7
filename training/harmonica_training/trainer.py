"""Trains a router and turns it into a schedule: one loop for every objective, in one process or several."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harmonica_rt.schedule import MadeBy, Schedule
from harmonica_rt.untrusted.text import described
from harmonica_training import distributed
from harmonica_training.cached_forward import frozen
from harmonica_training.conditions import Conditions
from harmonica_training.config import TrainConfig
from harmonica_training.errors import DivergenceError, TrainingError
from harmonica_training.harmonica import HarmoniCa, Objective
from harmonica_training.progress import IterationRecord, Progress, Silent
from harmonica_training.router import logit
from harmonica_training.sdt import StepLosses
from harmonica_training.setting import Setting
from harmonica_training.training_state import TrainingState

DIVERGED = 10.0  # squared error relative to the uncached prediction's mean square, above which training stops
LAST_RATE = 0.1  # fraction of the learning rate that is left at the end of its decay
FP16_SCALE = 1024.0  # loss scale in half precision
SHOW_EVERY = 10  # iterations between images of the schedule


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

    Under `torchrun`, every process calls this with a pipeline on its own device. Each runs its share of the batch, and
    all return the same schedule.

    Args:
        pipeline: a diffusers pipeline; its parameters are not changed.
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
    state = TrainingState(setting, objective(setting), start)
    iterations = Iterations(state)
    checkpoints = None if directory is None else Path(directory)
    state.resume(checkpoints)
    shown = progress if progress is not None and distributed.rank() == 0 else Silent()
    history = []
    stopped = False
    try:
        try:
            shown.begin(config.iterations, state.iteration)
            with frozen(setting.model):
                while state.iteration < config.iterations:
                    history.append(iterations.step())
                    state.keep()
                    iterations.tell(history[-1], shown)  # after keep(), so that it can no longer be lost
                    if checkpoints is not None and state.iteration % config.checkpoint_every == 0:
                        state.save(checkpoints)
        except KeyboardInterrupt as stop:  # at any instruction: only the state that was kept last is valid
            stopped = True
            raise state.interrupted(checkpoints) from stop  # saved before the log is closed, which may take long
        finally:
            shown.end()
        if checkpoints is not None:
            state.save(checkpoints)
        return iterations.result(tuple(history))
    except KeyboardInterrupt as stop:
        if stopped:  # a second Ctrl-C: nothing more is saved
            raise
        raise state.interrupted(checkpoints) from stop


class Iterations:
    """The iterations of a training on its state, and the schedule that they give."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._config = config = state.setting.config
        # soft gates define no schedule before the end, and under a fixed beta the best images cost the most
        self._settles = config.gates == "hard" and config.beta is None
        self._mask: NDArray[np.bool_]  # the schedule after the last iteration

    def step(self) -> IterationRecord:
        """Run one iteration."""
        started = time.perf_counter()
        config, router, steering = self._config, self._state.router, self._state.steering
        scale = FP16_SCALE if config.precision == "fp16" else 1.0
        scores = router.scores()
        computes = self._computes()
        gates = scores if config.gates == "soft" else torch.from_numpy(computes).to(scores)
        losses = self._state.objective.losses(self._state.iteration, gates, computes, scale)
        by_score, mse = self._checked(losses)
        steering.observe(by_score, losses.drawn, router.free, computes)
        penalty = steering.penalty().to(by_score)
        router.set_gradient(by_score + penalty, losses.drawn)
        rate = self._learning_rate()
        for group in self._state.optimizer.param_groups:
            group["lr"] = rate
        self._state.optimizer.step()
        router.clamp()
        steering.follow(router.logits, rate, router.free)
        self._state.iteration += 1
        self._mask = computes = self._computes()
        if self._settles:
            self._state.settling.follow(self._state.iteration, computes, router.logits)
        cost = float((scores[losses.drawn] * penalty).sum())
        error = float((mse * self._state.objective.weights).sum())
        return IterationRecord(
            iteration=self._state.iteration,
            loss=error + cost,
            mse=float(mse[losses.drawn].mean()),
            penalty=cost,
            beta=steering.beta or 0.0,
            cur=1.0 - float(computes.mean()),
            speedup=self._state.setting.costs.speedup(computes),
            seconds=time.perf_counter() - started,
        )

    def tell(self, record: IterationRecord, progress: Progress) -> None:
        """Report the iteration that has just finished."""
        if self._state.objective.renewed:
            progress.renewed(self._state.iteration, self._state.objective.weights.tolist())
        progress.iteration(record)
        if self._state.iteration % SHOW_EVERY == 0 or self._state.iteration == self._config.iterations:
            progress.schedule(self._state.iteration, self._state.router.scores().double().cpu().numpy(), self._mask)

    def _computes(self) -> NDArray[np.bool_]:
        """The current mask: r > tau; with hard gates and a target, tau is the threshold that meets the target."""
        config = self._config
        if config.gates == "soft":
            return self._state.router.computes(config.tau)
        mask, threshold = self._land()
        self._state.router.shift(logit(config.tau) - logit(threshold))
        return mask

    def _land(self) -> tuple[NDArray[np.bool_], float]:
        """The mask that meets the target now, and its threshold; see `Target.land`."""
        scores = self._state.router.scores().double().cpu().numpy()
        return self._state.steering.target.land(scores, self._state.steering.prices.double().numpy(), self._config.tau)

    def result(self, history: tuple[IterationRecord, ...]) -> TrainingResult:
        """The result: the best schedule that was measured, or else the router's current one, on its target."""
        config, setting = self._config, self._state.setting
        mask, threshold = self._land()
        best = self._state.settling.best
        if best is not None:
            self._state.router.load(best.logits)
            mask, threshold = best.computes, config.tau
        scores = self._state.router.scores().double().cpu().numpy()
        free = self._state.router.free
        logits = [row.tolist() if may else None for row, may in zip(self._state.router.logits, free, strict=True)]
        record = {
            **config.plain(),
            "conditions": setting.conditions.describe(),
            "processes": distributed.world(),
            "final_beta": self._state.steering.beta,
            "validated_error": best and best.error,
        }
        made_by = MadeBy(self._state.objective.method, record, threshold, logits)
        schedule = Schedule.from_array(mask, setting.sites, made_by=made_by)
        return TrainingResult(
            schedule=setting.describe(schedule),
            scores=scores,
            speedup=setting.costs.speedup(mask),
            beta=self._state.steering.beta or 0.0,
            history=history,
        )

    def _checked(self, losses: StepLosses) -> tuple[Tensor, Tensor]:
        """Gradient and errors, averaged over all processes; DivergenceError if they are not usable."""
        by_score, mse, power = (distributed.mean(part) for part in (losses.by_score, losses.mse, losses.power))
        if not bool(by_score.isfinite().all()) or not bool(mse.isfinite().all()):
            step = int((~mse.isfinite()).nonzero()[0]) if not bool(mse.isfinite().all()) else None
            where = "its gradient" if step is None else f"the error of step {step}"
            hint = "bf16 has the range of fp32" if self._config.precision == "fp16" else "look at the model's outputs"
            raise DivergenceError(f"iteration {self._state.iteration}: {where} is not finite; {hint}")
        relative = float(mse.sum() / power.sum().clamp(min=torch.finfo(torch.float64).tiny))
        if relative > DIVERGED:
            raise DivergenceError(
                f"iteration {self._state.iteration}: the squared error under cache is {relative:.3g} times the mean "
                f"square of the uncached prediction; lower the target or beta, or the learning rate"
            )
        return by_score, mse

    def _learning_rate(self) -> float:
        config = self._config
        decaying = round(config.iterations * config.decay)
        done = self._state.iteration - (config.iterations - decaying)
        if decaying == 0 or done <= 0:
            return config.learning_rate
        cosine = 0.5 * (1 + math.cos(math.pi * done / decaying))
        return config.learning_rate * (LAST_RATE + (1 - LAST_RATE) * cosine)
