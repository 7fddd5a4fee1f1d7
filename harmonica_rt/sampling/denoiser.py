"""A denoiser that runs under a schedule: called like the model, over any engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from harmonica_rt.call.call import CallConvention
from harmonica_rt.changes import Changes
from harmonica_rt.engine import Engine
from harmonica_rt.errors import HarmonicaError, RunError
from harmonica_rt.execute.sampler import Sampler
from harmonica_rt.model.forward import own_forward
from harmonica_rt.model.hooked_call import call_with_hooks
from harmonica_rt.model.hooks import all_hooks, forward_hooks_of_every_module
from harmonica_rt.model.use import run_untraced
from harmonica_rt.reference_engine import ReferenceEngine
from harmonica_rt.sampling.known_samplers import KnownSamplers
from harmonica_rt.sampling.outside_dynamo import outside_dynamo
from harmonica_rt.sampling.run import Run
from harmonica_rt.sampling.sampled_run import ModelTimestep, SampleOptions, sampled_run
from harmonica_rt.sampling.session import Session
from harmonica_rt.schedule import Schedule, ScheduleSet
from harmonica_rt.wrappers import unwrapped, wrappers


class Denoiser(Session):
    """The model under a schedule. Everything but the call (config, dtype, parameters(), ...) is the model's own.

    For a wrapped model, `model` is the one inside and `given` is the wrapper, whose attributes this object exposes. To
    `isinstance` it has the model's class, because pipelines save, move and offload only modules of a class they know.
    Attributes set on it are set on `given`.
    """

    def __init__(
        self, given: nn.Module, schedule: Schedule | ScheduleSet, engine: Engine, on_other_steps: str = "error"
    ) -> None:
        model: nn.Module = unwrapped(given)
        super().__init__(type(model).__name__, schedule, engine, on_other_steps)
        self.model, self.given = model, given
        self._convention = CallConvention(model)
        self.__module__ = type(model).__module__  # diffusers writes it and the class's name into a saved pipeline
        self._samplers = KnownSamplers(self._choice.expected)
        self._complete = True  # from here on, new attributes are set on `given`

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The model's class, for `isinstance`; `type()` returns the actual class."""
        return type(self.model) if "model" in self.__dict__ else type(self)

    @outside_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the denoiser, in the current step of the current run. Arguments and result are the model's.

        A call from within another call (from a hook of the model) runs the plain model.

        Raises:
            RunError: the call cannot belong to the current run (no steps left, timesteps reversed, a failed run).
            ScheduleMismatchError: the pipeline asked for a number of steps other than the schedule's.
            ConcurrentRunError: another thread is using this denoiser, or two loops alternate on it.
            CaptureError: in strict mode, the model cannot be captured.
        """
        if self._turns.mine:
            return call_with_hooks(self.model, self._plain, args, kwargs)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            forward = functools.partial(_with_hooks, self.model, self._forward)
            for wrapper in () if self._following else reversed(wrappers(self.given)):
                forward = functools.partial(_with_hooks, wrapper, forward)  # a pipeline calls the wrapper itself
            return forward(*args, **kwargs)

    @outside_dynamo
    def sample(
        self,
        latents: torch.Tensor,
        scheduler: Any,
        /,
        *,
        guidance_scale: float | None = None,
        conditional_first: bool = False,
        model_timestep: ModelTimestep | None = None,
        begin_index: int | None = None,
        **conditioning: Any,
    ) -> torch.Tensor:
        """Sample in a run of its own: from `latents`, with the steps of a diffusers scheduler, to the final latents.

        The loop is that of a pipeline without callbacks. On a GPU with CUDA graphs, once the first runs have recorded
        their steps, all steps of a run are replayed as one graph, so that the host's work does not grow with their
        number. The model is checked for changes before the run and after it; hooks on the model itself, or more than
        128 steps, keep it step by step.

        The scheduler's step must be a fixed linear combination of latents and model outputs: DDIM, DPM-Solver++ of any
        order, Euler, flow matching, and others; not those that draw noise or clip. It is only read. Between the steps
        latents are fp32 (fp64 for fp64 latents); the model is given them in the dtype of `latents`.

        Args:
            latents: `[B, C, ...]`, noise as the scheduler wants it (times `init_noise_sigma`), or a noised image.
            scheduler: with `set_timesteps` called. The same scheduler, not set anew, costs the least.
            guidance_scale: the scale of classifier-free guidance: the model is called with the latents twice along the
                batch, and takes conditioning for both halves. None calls it once per image, as for distilled guidance.
            conditional_first: whether the conditional half of the batch is the first one, as in `DiTPipeline`; in other
                pipelines it is the second.
            model_timestep: what the model is given for the scheduler's timesteps, if not themselves: called once with
                all of them, `[steps]` on the CPU. Flux takes `lambda t: t / 1000`.
            begin_index: the step of the scheduler to begin with, for image-to-image; by default its own `begin_index`,
                or 0.
            conditioning: the other arguments of the model, by name, the same in all steps.

        Returns:
            The final latents, in the dtype of `latents`. Output channels beyond theirs (a learned variance) are not
            used.

        Raises:
            SamplerError: the scheduler's steps are no fixed linear combination, it is in mid-run, or the model's output
                does not fit the latents.
            ScheduleMismatchError: the scheduler is set to a number of steps other than the schedule's.
            ArgumentError: an argument is not what it should be.
            RunError: a run of its pipeline is under way (in a callback), which this one would end.
            ConcurrentRunError, CaptureError: see the call of the model.
        """
        options = SampleOptions(
            guidance_scale=guidance_scale,
            conditional_first=conditional_first,
            model_timestep=model_timestep,
            begin_index=begin_index,
        )
        asked = sampled_run(latents, self._samplers, scheduler, options, conditioning, self._convention)
        changes = Changes()
        with changes, changes:
            self._enter(changes)
            if self._following and self._current.under_way:
                raise RunError(
                    f"a run of a pipeline is under way on this {self._model_name}, and another would end it. Sample "
                    "after it, or with a compiled model of its own"
                )
            self._by_hand.begins(self._current.run)
            run = self._begin(self._choice.of(asked.sampler.first + len(asked.sampler.rows)))
            run.key = asked.key
            run.begin_at(asked.sampler.first)
            result = None
            try:
                result = asked.run(functools.partial(self._step_of, run))
            finally:
                run.failed = result is None  # no later call may go on with what is left of it
                self.last_stats = run.stats
                if self._following:
                    self._current.run = None  # calls of a pipeline are not this run's
        return result

    def _step_of(self, run: Run, arguments: dict[str, Any], sampler: Sampler | None) -> object:
        """The call of the model in the current step of `run`, or in all its steps."""
        around = wrappers(self.given)
        if any(map(all_hooks, (self.model, *around))) or any(forward_hooks_of_every_module()):
            sampler = None  # hooks run around every call

        def forward(*args: Any, **kwargs: Any) -> Any:
            if run.uncached:
                with torch.no_grad():
                    return run.call_uncached(lambda: self._plain(*args, **kwargs), counts_as_step=True)
            return run.call(self._convention.normalise(args, kwargs), counts_as_step=True, sampler=sampler)

        for module in (self.model, *reversed(around)):
            forward = functools.partial(_with_hooks, module, forward)
        return forward(**arguments)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles hold the model and the schedule; each has its own runs and belongs to no pipeline."""
        if not isinstance(self.engine, ReferenceEngine):
            raise HarmonicaError(f"{self!r} cannot be copied while it is being verified; copy its `model` instead")
        return _reference_of, (type(self), self.given, self.schedule, self._choice.on_other_steps)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of a {type(self.model).__name__}, {self.schedule!r}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if "_complete" not in self.__dict__:
            super().__setattr__(name, value)
        elif name in ("model", "given", "schedule", "engine"):
            raise HarmonicaError(
                f"the {name} of a compiled model is fixed; compile the model or the pipeline again for another one"
            )
        elif name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.given, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.given, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "given" not in self.__dict__:
            raise AttributeError(name)
        value = getattr(self.given, name)
        owner = getattr(value, "__self__", None)
        if not isinstance(value, MethodType) or not (owner is self.given or owner is self.model) or name == "forward":
            return value

        @functools.wraps(value.__func__)
        def method(self: Denoiser, *args: Any, **kwargs: Any) -> Any:
            """`to`, `half`, `eval` and the like return the module itself: here, that is this denoiser."""
            result = value(*args, **kwargs)
            return self if result is owner else result

        return MethodType(method, self)  # dynamo assumes that a module's methods are bound

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self._convention.normalise(args, kwargs)
        return self._call(call, lambda: self._plain(*args, **kwargs))

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        changes = Changes()
        with changes, changes:
            run_untraced(self.model, changes)
            return own_forward(self.model)(*args, **kwargs)


def _with_hooks(model: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call_with_hooks(model, inner, args, kwargs)


def _reference_of(
    kind: type[Denoiser], given: nn.Module, schedule: Schedule | ScheduleSet, on_other_steps: str = "error"
) -> Denoiser:
    engine = ReferenceEngine(unwrapped(given), ScheduleSet.of(schedule).schedules[0])
    return kind(given, schedule, engine, on_other_steps)
