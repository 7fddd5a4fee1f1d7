"""Runs a pipeline's own denoising loop with a replacement for its denoiser.

Hazard: every pipeline mixes guidance, splits learned variances, and scales and shifts timesteps in its own way, and
higher-order solvers keep a history. A second loop written here would be right for only some of them. So a run of the
loop is one call of the pipeline itself, on a copy that shares the modules but has its own scheduler (runs may nest),
and it ends with the last `scheduler.step`: nothing is decoded.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from harmonica_rt.changes import Changes
from harmonica_rt.wrappers import DENOISER_NAMES, named_denoiser
from harmonica_training.errors import TrainingError
from harmonica_training.forward_replacement import own_forward, replace_forward
from harmonica_training.scheduler_patches import give_generators, limit, start_from

T = TypeVar("T")
StreamKey = tuple[int, tuple[torch.Size, ...]]


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser in a run of the loop.

    Attributes:
        step: number of `scheduler.step` calls before it in this run.
        stream: identifies the call within its step, by position and tensor shapes; each stream has its own cache.
        forward: runs the denoiser with the arguments that the pipeline passed.
    """

    step: int
    stream: StreamKey
    forward: Callable[[], Any]


Denoise = Callable[[DenoiserCall], Any]
"""Replaces a call of the denoiser: returns what the denoiser would."""


class DenoisingLoop:
    """The denoising loop of a pipeline, from noise to its final latents.

    Args:
        pipeline: a diffusers pipeline, or anything that is called like one and has a `scheduler` and a denoiser.
        steps: `num_inference_steps` of its call.
        arguments: further arguments of every call: guidance, size, ...

    Raises:
        TrainingError: the pipeline has no denoiser of a known name, or does not take one of the arguments.
    """

    def __init__(self, pipeline: Any, *, steps: int, arguments: Mapping[str, Any] | None = None) -> None:
        self.pipeline = pipeline
        self.denoiser = find_denoiser(pipeline)
        self.steps = steps
        self.arguments = dict(arguments or {})
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        unknown = [name for name in self.arguments if name not in self._parameters]
        if unknown:
            raise TrainingError(f"{type(pipeline).__name__} takes no argument {', '.join(unknown)}")

    def run(
        self,
        inputs: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        denoise: Denoise,
        *,
        window: tuple[int, int] | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Run the loop once, with `denoise` in place of every call of the denoiser.

        Args:
            inputs: arguments of the pipeline's call for this batch of B samples.
            generators: one per sample, for the noise that the run starts from and that its scheduler adds.
            denoise: called in place of the denoiser.
            window: run only the steps `first <= step < last`; calls still count them from 0.
            start: latents `[B, ...]` to start from, instead of noise.

        Returns:
            the latents after the last step, as the scheduler returned them (guidance may have doubled the batch).

        Raises:
            TrainingError: the loop ended before its scheduler's timesteps did.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        counter = _Counter()
        arguments = dict(inputs)
        if window is not None:
            limit(scheduler, *window)
        if start is not None and "latents" in self._parameters:
            arguments["latents"] = start
        elif start is not None:
            start_from(scheduler, start)
        give_generators(scheduler, list(generators))
        _count_steps(scheduler, counter)
        latents: Tensor = self._call_pipeline(scheduler, arguments, generators, denoise, counter)
        return latents

    def probe(
        self, inputs: Mapping[str, Any], generators: Sequence[torch.Generator], visit: Callable[[DenoiserCall], T]
    ) -> tuple[tuple[float, ...], T]:
        """The timesteps of a run, one per step (as many as its NFE), and the result of `visit` for its first call.

        The run stops at that call.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)

        def first(call: DenoiserCall) -> Any:
            raise _Ended((tuple(float(t) for t in scheduler.timesteps), visit(call)))

        found: tuple[tuple[float, ...], T] = self._call_pipeline(scheduler, inputs, generators, first, _Counter())
        return found

    def _call_pipeline(
        self,
        scheduler: Any,
        inputs: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        denoise: Denoise,
        counter: _Counter,
    ) -> Any:
        """Call the pipeline, with `denoise` as its denoiser, until `_Ended` is raised; returns the value it carries."""
        forward = own_forward(self.denoiser)

        def answer(*args: Any, **kwargs: Any) -> Any:
            shapes = tuple(leaf.shape for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            stream = (counter.calls, shapes)
            counter.calls += 1
            return denoise(DenoiserCall(counter.steps, stream, functools.partial(forward, *args, **kwargs)))

        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = scheduler
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        arguments = {**self.arguments, **inputs, "num_inference_steps": self.steps, "generator": list(generators)}
        changes = Changes()
        try:
            with changes, changes, torch.no_grad():
                replace_forward(self.denoiser, answer, changes)
                pipeline(**arguments)
        except _Ended as end:
            return end.value
        raise TrainingError(
            f"the loop of {type(self.pipeline).__name__} ended before its scheduler's timesteps did; schedules are "
            f"trained on whole runs, from noise to image"
        )


def find_denoiser(pipeline: Any) -> nn.Module:
    """The module that a pipeline calls at every step.

    Raises:
        TrainingError: there is no module of a known name, or it is a compiled model.
    """
    found = named_denoiser(pipeline, nn.Module)
    if found is not None:
        name, module = found
        if isinstance(vars(module).get("given"), nn.Module):
            raise TrainingError(
                f"{name} is a compiled model; schedules are learned on plain ones: pipe.{name} = pipe.{name}.given"
            )
        return module
    if isinstance(pipeline, str | os.PathLike):
        remedy = f"DiffusionPipeline.from_pretrained({os.fspath(pipeline)!r})"
        raise TrainingError(f"expected a pipeline, got the path {os.fspath(pipeline)!r}; load it first: {remedy}")
    raise TrainingError(
        f"{type(pipeline).__name__} has no denoiser: expected a module named {' or '.join(DENOISER_NAMES)}"
    )


@dataclass
class _Counter:
    steps: int = 0
    calls: int = 0  # of the denoiser, at this step


class _Ended(Exception):
    """Raised to end a run of the loop; carries its result."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _count_steps(scheduler: Any, counter: _Counter) -> None:
    """Count the scheduler's steps, and end the run after the last."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        counter.steps += 1
        counter.calls = 0
        if counter.steps == len(scheduler.timesteps):
            raise _Ended(pytree.tree_leaves(result)[0])
        return result

    scheduler.step = counted
