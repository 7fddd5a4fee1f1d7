"""The training loop of all networks: it stops when told, resumes exactly, and keeps averaged parameters.

Hazard: threads inside an operator wait for each other at its end, which on a machine that others use takes most of the
time. So each batch is cut into `PARTS` of equal weight, whose gradients are computed by one thread each and added in
order: the result does not depend on the number of threads.

Random numbers come from `streams` by step, so the state of a run is its parameters, their averages, the optimiser and
the number of steps.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from harmonica_rt.untrusted.text import one_line
from harmonica_training.digits.files import read_torch
from harmonica_training.digits.optim import AveragedParameters, set_learning_rate
from harmonica_training.errors import TrainingError

logger = logging.getLogger(__name__)
PARTS = 2  # of a batch
LOSS_WINDOW = 100  # steps over which a reported loss is averaged
CHECKPOINT_SECONDS = 120.0
_STATE = ("model", "averages", "optimizer", "step", "losses", "window", "seconds", "resumed")

# the batch of a step as the losses of its parts; the loss of the step is their sum
LossParts = Callable[[int], Sequence[Callable[[], Tensor]]]


@dataclasses.dataclass(frozen=True)
class Course:
    """How a network is trained.

    Attributes:
        name: shown in the log.
        steps: AdamW steps.
        rate: peak learning rate.
        ema_decay: decay of the averaged parameters; lower during their warm-up.
    """

    name: str
    steps: int
    rate: float
    ema_decay: float = 0.999

    def rate_at(self, step: int) -> float:
        """Linear warm-up (5 % of the steps, 300 at most), constant, then linear to zero over the last fifth."""
        warmup, fall = max(1, min(300, self.steps // 20)), max(1, self.steps // 5)
        return self.rate * min(1.0, (step + 1) / warmup, (self.steps - step) / fall)


@dataclasses.dataclass(frozen=True)
class Workers:
    """What a run goes on with and stops by: threads, and a flag that a signal sets."""

    threads: int
    stop: threading.Event


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        steps: steps done.
        losses: mean loss of each 100 steps in turn.
        seconds: wall time of all runs that led here, seconds.
        resumed: steps at which training resumed after a break.
    """

    steps: int
    losses: list[float]
    seconds: float
    resumed: list[int]


class StoppedError(TrainingError):
    """The run was told to stop; its checkpoint is written."""


class Run:
    """A network in training, with its optimiser and averages; `checkpoint` is the file that all of it is kept in.

    Raises:
        TrainingError: the checkpoint is damaged, or of another network.
    """

    def __init__(self, model: nn.Module, course: Course, checkpoint: Path) -> None:
        self.model, self.course, self.checkpoint = model.eval(), course, checkpoint
        self.averages = AveragedParameters(model, course.ema_decay)
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.progress = Progress(0, [], 0.0, [])
        self.window: list[float] = []
        if checkpoint.exists():
            self._load()

    def train(self, parts_of: LossParts, workers: Workers, watch: Callable[["Run"], None] | None = None) -> None:
        """Train to the last step, or until told to stop.

        Args:
            parts_of: draws the batch of a step.
            workers: threads and the flag to stop by.
            watch: called after each step.

        Raises:
            StoppedError: the flag was set; the checkpoint is written.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started, earlier = time.monotonic(), self.progress.seconds
        saved = started
        try:
            with ThreadPoolExecutor(workers.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                while self.progress.steps < self.course.steps:
                    self._step(parts_of(self.progress.steps), pool)
                    now = time.monotonic()
                    self.progress = dataclasses.replace(self.progress, seconds=earlier + now - started)
                    done, stop = self.progress.steps == self.course.steps, workers.stop.is_set()
                    if done or stop or now - saved > CHECKPOINT_SECONDS:
                        self.save()
                        saved = now
                    if watch is not None:
                        watch(self)
                    if stop and not done:
                        raise StoppedError(f"{self.course.name} was stopped after {self.progress.steps} steps")
        finally:
            torch.set_num_threads(threads)

    def _step(self, parts: Sequence[Callable[[], Tensor]], pool: ThreadPoolExecutor) -> None:
        parameters, step = list(self.model.parameters()), self.progress.steps

        def gradients(part: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = part()
            return loss.detach(), torch.autograd.grad(loss, parameters)

        results = list(pool.map(gradients, parts))
        for parameter, *found in zip(parameters, *(result[1] for result in results), strict=True):
            parameter.grad = torch.stack(found).sum(dim=0)
        set_learning_rate(self.optimizer, self.course.rate_at(step))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.averages.update(self.model)
        self.window.append(sum(float(result[0]) for result in results))
        self.progress = dataclasses.replace(self.progress, steps=step + 1)
        if len(self.window) == LOSS_WINDOW or step + 1 == self.course.steps:
            loss = sum(self.window) / len(self.window)
            self.progress = dataclasses.replace(self.progress, losses=[*self.progress.losses, loss])
            self.window.clear()
            logger.info("%s: step %d of %d, loss %.5f", self.course.name, step + 1, self.course.steps, loss)

    def save(self) -> None:
        """Write the checkpoint; the file is whole at any time."""
        state = {
            "model": self.model.state_dict(),
            "averages": self.averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.progress.steps,
            "losses": self.progress.losses,
            "window": self.window,
            "seconds": self.progress.seconds,
            "resumed": self.progress.resumed,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        state = read_torch(self.checkpoint, _STATE)
        try:
            self.model.load_state_dict(state["model"])
            self.averages.restore(state["averages"], state["step"])
            self.optimizer.load_state_dict(state["optimizer"])
            step, self.window = int(state["step"]), list(state["window"])
            resumed = [*state["resumed"], step] if step < self.course.steps else list(state["resumed"])
            self.progress = Progress(step, list(state["losses"]), float(state["seconds"]), resumed)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            message = f"{self.checkpoint} is of another model, or damaged: {one_line(error, 300)}"
            raise TrainingError(message) from error
        logger.info("%s: resumed at step %d of %d", self.course.name, step, self.course.steps)

    def load_averages(self) -> None:
        """Put the averaged parameters into the model, in place; the run ends with this."""
        self.model.load_state_dict(self.averages.state_dict(), strict=False)
