"""Finds out what a diffusers scheduler computes between the steps of a run, as a table of weights.

The formulas stay the scheduler's own: a copy of it takes the steps of the run with unit vectors in place of latents and
model outputs, each step with two of its own. What comes out of a step are the weights of all earlier ones. A second
copy takes the steps with random numbers, which the table must predict: a scheduler that draws noise, clips, or decides
by values is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from harmonica_rt.engine import RunKey
from harmonica_rt.errors import ArgumentError, HarmonicaError, SamplerError
from harmonica_rt.execute.sampler import SamplerTable
from harmonica_rt.indices import StepIndex
from harmonica_rt.sampling.run_timesteps import RunSteps, timesteps_are_set

MAX_DEPTH = 4  # steps whose latents and outputs are kept; DPM-Solver++ takes up to 3
TOLERANCE = 1e-4  # of the sum of all absolute terms; schedulers compute in fp32 within their steps
_MAGNITUDES = (1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 100.0, 1e3)  # of the random numbers

# What makes the steps of a scheduler no fixed sum, by the options of its config; and why.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "thresholding": (bool, "clips by values"),
    "clip_sample": (bool, "clips by values"),
    "algorithm_type": (lambda value: str(value).startswith("sde"), "draws noise in every step"),
    "stochastic_sampling": (bool, "draws noise in every step"),
}


# The functions and methods of torch that draw random numbers.
_DRAWING = frozenset(
    (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
        *("multinomial", "poisson", "binomial", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"),
        *("cauchy_", "geometric_", "log_normal_", "dropout"),
    )
)


@dataclass(frozen=True, eq=False)
class SchedulerRun:
    """A run of a scheduler, as it is set.

    Attributes:
        table: what it computes between the steps.
        first: the step of the schedule that the run begins with.
        key: the key of the run.
        timesteps: `[rows]`, those of its steps, on the CPU.
        values: the same as numbers.
    """

    table: SamplerTable
    first: StepIndex
    key: RunKey
    timesteps: torch.Tensor
    values: tuple[float, ...]


def scheduler_run(scheduler: Any, steps: int, begin_index: int | None) -> SchedulerRun:
    """The run that a scheduler is set to.

    Args:
        scheduler: set to the timesteps of the run; it is left as it is.
        steps: number of steps of the schedule.
        begin_index: the step of the scheduler that the run begins with; None for what it is set to itself.

    Raises:
        SamplerError: its steps are no fixed linear combination, or it is not at the beginning of a run.
        ScheduleMismatchError: it is set to another number of steps.
    """
    name = type(scheduler).__name__
    _check(scheduler, name)
    with torch.device("cpu"), torch.no_grad(), _no_trace_of_draws():
        try:
            return _scheduler_run(scheduler, name, steps, begin_index)
        except HarmonicaError:
            raise
        except Exception as error:  # whatever the code of a scheduler raises for what it is given here
            raise SamplerError(
                f"this {name} cannot be stepped with latents, a model output and a timestep alone, which is all that "
                f"sample() has ({type(error).__name__}: {error}). Sample with a loop of your own, or another scheduler"
            ) from error


def _scheduler_run(scheduler: Any, name: str, steps: int, begin_index: int | None) -> SchedulerRun:
    first_copy, second_copy = (_at_beginning(scheduler, begin_index) for _ in range(2))
    run = RunSteps.of(first_copy, steps)
    if run.timesteps is None or run.key is None:
        raise SamplerError(f"a {name} has no tensor of timesteps [steps], which sample() needs")
    rows = steps - run.first
    timesteps = run.timesteps.known[-rows:]
    weights, scales = _probed(first_copy, rows)
    wrong = _first_wrong_row(second_copy, SamplerTable(weights, scales))
    if wrong is not None:
        raise SamplerError(
            f"the steps of this {name} are no fixed sum of latents and outputs (step {wrong} of the run differs): "
            "it draws noise, clips or decides by values. Sample with a loop of your own, or another scheduler"
        )
    table = SamplerTable(_trimmed(weights, name), scales)
    return SchedulerRun(table, run.first, run.key, timesteps, tuple(timesteps.tolist()))


class _Draws(TorchFunctionMode):
    """Notes whether this thread may draw random numbers from torch's own generator."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        given = kwargs or {}
        self.seen |= getattr(func, "__name__", "") in _DRAWING and given.get("generator") is None
        return func(*args, **given)


@contextmanager
def _no_trace_of_draws() -> Iterator[None]:
    """Undo what the scheduler draws. Unless it draws, the generator, which other threads share, is left alone."""
    before, draws = torch.get_rng_state(), _Draws()
    try:
        with draws:
            yield
    finally:
        if draws.seen:
            torch.set_rng_state(before)


def _check(scheduler: Any, name: str) -> None:
    """Refuse what the scheduler itself says of its steps."""
    if not callable(getattr(scheduler, "step", None)) or not timesteps_are_set(scheduler):
        raise SamplerError(
            f"sample() needs a diffusers scheduler on which set_timesteps was called; this {name} has no timesteps yet"
        )
    if getattr(scheduler, "step_index", None) is not None:
        raise SamplerError(f"this {name} is in the middle or at the end of a run; call its set_timesteps first")
    config = getattr(scheduler, "config", {})
    for option, (refuses, why) in _REFUSED.items():
        value = config.get(option)
        if value is not None and refuses(value):
            other = "False" if value is True else "another value"
            raise SamplerError(
                f"a {name} with {option}={value!r} {why}, so a run of it is no fixed sum that could be computed on the "
                f"device alone. Pass {name}.from_config(scheduler.config, {option}=...) with {other}, or sample with a "
                "loop of your own"
            )


def _at_beginning(scheduler: Any, begin_index: int | None) -> Any:
    """A copy on the CPU, about to begin with this step."""
    copied = copy.deepcopy(scheduler)
    for name, value in list(vars(copied).items()):
        if isinstance(value, torch.Tensor):
            setattr(copied, name, value.cpu())
    if begin_index is not None:
        if begin_index >= len(copied.timesteps):
            raise ArgumentError(
                f"begin_index {begin_index} leaves none of the scheduler's {len(copied.timesteps)} steps"
            )
        if hasattr(copied, "set_begin_index"):
            copied.set_begin_index(begin_index)
        else:  # it finds each step by its timestep
            copied.begin_index = begin_index
    return copied


def _steps(scheduler: Any, latents: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the last `rows` steps of a scheduler with these latents and outputs, `[rows, n]` each.

    Returns:
        What the model would be given, and the next latents, `[rows, n]` each.
    """
    given, found = [], []
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # schedulers of flow matching have none
    for t, x, m in zip(scheduler.timesteps[-len(latents) :], latents, outputs, strict=True):
        x, m = (each.view(-1, 1, 1, 1).clone() for each in (x, m))  # [B, C, H, W]
        given.append(scale(x.clone(), t).flatten().to(x.dtype))
        found.append(scheduler.step(m, t, x, return_dict=False)[0].flatten().to(x.dtype))
    return torch.stack(given), torch.stack(found)


def _probed(scheduler: Any, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weights of all steps, `[rows, rows, 2]` by step and steps back, and the input scales, `[rows]`."""
    units = torch.eye(2 * rows, dtype=torch.float64)
    given, found = (each.numpy() for each in _steps(scheduler, units[::2], units[1::2]))
    weights = np.zeros((rows, rows, 2))
    for row in range(rows):
        weights[row, : row + 1] = found[row].reshape(rows, 2)[row::-1]
    return weights, given.reshape(rows, rows, 2)[range(rows), range(rows), 0].copy()


def _trimmed(weights: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """The weights of as many steps back as any step takes.

    Raises:
        SamplerError: these are too many.
    """
    depth = int(np.flatnonzero((weights != 0).any(axis=(0, 2))).max(initial=0)) + 1  # NaN counts
    if depth > MAX_DEPTH:
        raise SamplerError(
            f"a {name} combines latents or model outputs of {depth} steps, and sample() keeps those of at most "
            f"{MAX_DEPTH}. Sample with a loop of your own, or with a scheduler such as DDIM, DPM-Solver++ or Euler"
        )
    return weights[:, :depth]


def _first_wrong_row(scheduler: Any, table: SamplerTable) -> int | None:
    """The first step whose result the table does not predict for random numbers; None if there is none."""
    rows = len(table.weights)
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x, m = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) * magnitudes for _ in range(2))
    given, found = (each.numpy() for each in _steps(scheduler, x, m))
    past = np.stack([x.numpy(), m.numpy()])  # [2, rows, n]
    for row in range(rows):
        weights = table.weights[row, : row + 1]  # [depth, 2]
        terms = np.stack([past[:, row - back] * weights[back][:, None] for back in range(len(weights))])
        scaled = past[0, row] * table.scales[row]
        errors = np.stack([found[row] - terms.sum((0, 1)), given[row] - scaled])
        allowed = TOLERANCE * np.stack([np.abs(terms).sum((0, 1)), np.abs(scaled)])
        if not (np.abs(errors) <= allowed).all():  # nor for NaN
            return row
    return None
