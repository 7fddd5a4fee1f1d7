"""Puts a denoiser under a schedule into a pipeline, and removes it again.

The pipeline's own module stays where it is, with its class, attributes and parameters; only its call is replaced.
Torch calls a module's `_compiled_call_impl` if it is set, as `nn.Module.compile` does, and leaves it out of copies and
pickles. So copies and saved files of the module are unaffected.
"""

from __future__ import annotations

import functools
import re
import weakref
from typing import Any

from torch import nn

from harmonica_rt.changes import Changes
from harmonica_rt.errors import HarmonicaError
from harmonica_rt.model.hooked_call import call_with_hooks
from harmonica_rt.sampling.denoiser import Denoiser
from harmonica_rt.sampling.following import scheduler_in_use
from harmonica_rt.sampling.scheduler import listener_of, unwatch
from harmonica_rt.wrappers import DENOISER_NAMES, compiled_around, named_denoiser, unwrapped

_last_installed: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Denoiser]] = weakref.WeakKeyDictionary()


def is_pipeline(candidate: Any) -> bool:
    """Whether this is a pipeline, or another object (no module) that holds a denoiser and the scheduler it steps."""
    if isinstance(candidate, (nn.Module, type)) or getattr(candidate, "scheduler", None) is None:
        return False
    return callable(candidate) or named_denoiser(candidate, nn.Module) is not None


def denoiser_module(pipeline: Any) -> nn.Module:
    """The model that a pipeline calls at each step, without its wrappers.

    Raises:
        HarmonicaError: the pipeline has no module of a known name.
    """
    inner: nn.Module = unwrapped(held_denoiser(pipeline))
    return inner


def held_denoiser(pipeline: Any) -> nn.Module:
    """The denoiser as the pipeline holds it, including any wrappers.

    Raises:
        HarmonicaError: the pipeline has no module of a known name.
    """
    found = named_denoiser(pipeline, nn.Module)
    if found is not None:
        _, module = found
        return module.given if isinstance(module, Denoiser) else module
    raise HarmonicaError(
        f"{type(pipeline).__name__} has no denoiser named {' or '.join(DENOISER_NAMES)}; compile the model itself"
    )


def other_denoisers(pipeline: Any) -> list[str]:
    """Names of the pipeline's other denoisers, which run uncached: a denoiser's name with a prefix or suffix."""
    denoiser = denoiser_module(pipeline)
    return [
        name
        for name, value in vars(pipeline).items()
        if isinstance(value, nn.Module)
        and unwrapped(value) is not denoiser
        and any(re.fullmatch(rf"(\w+_)?{known}(_\w+)?", name) for known in DENOISER_NAMES)
    ]


def installed(module: nn.Module) -> Denoiser | None:
    """The denoiser that replaces the call of `module`, or None."""
    call = module.__dict__.get("_compiled_call_impl")
    return call if isinstance(call, Denoiser) else None


def install(pipeline: Any, denoiser: Denoiser) -> None:
    """Let `denoiser` replace the call of the pipeline's module, and follow the pipeline's scheduler.

    If another denoiser was installed in the module, `denoiser` replaces it in all pipelines that share the module.
    """
    before = installed(denoiser.model)
    current = listener_of(pipeline.scheduler)
    if current is not None and current is not before and _left_over(pipeline) is None:
        raise scheduler_in_use(current)
    sharing = [other for other in before.pipelines if denoiser_module(other) is denoiser.model] if before else []
    uninstall(pipeline)
    for one in (*sharing, pipeline):
        denoiser.attach(one)
    # Not by setattr: a denoiser counts as a module, and a module set as an attribute becomes a child.
    denoiser.model.__dict__["_compiled_call_impl"] = denoiser
    for one in denoiser.pipelines:
        for wrapper in compiled_around(held_denoiser(one)):
            wrapper.__dict__["_compiled_call_impl"] = _NotTraced(wrapper, denoiser.model)
    _last_installed[denoiser.model] = weakref.ref(denoiser)


class _NotTraced:
    """Replaces the call of an `OptimizedModule`, because dynamo would bypass the call installed in the model inside."""

    def __init__(self, wrapper: nn.Module, model: nn.Module) -> None:
        self._wrapper, self._model = wrapper, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its installed call; if no denoiser is installed, restore and call the wrapper itself."""
        if installed(self._model) is None:
            self._wrapper.__dict__.pop("_compiled_call_impl", None)
            return self._wrapper(*args, **kwargs)
        return call_with_hooks(self._wrapper, self._model, args, kwargs)


def follower_of(module: nn.Module) -> Denoiser | None:
    """The denoiser last installed in `module`, if it still follows pipelines, even if its call was replaced since."""
    last = _last_installed.get(module)
    denoiser = last() if last is not None else None
    return denoiser if denoiser is not None and denoiser.pipelines else None


def install_assigned(pipeline: Any) -> None:
    """Install a compiled model that was assigned to a pipeline.

    This makes `pipe.transformer = compile(pipe.transformer, schedule)` work. The pipeline gets its own module back,
    with the call of that module replaced.

    Raises:
        HarmonicaError: it was assigned in place of a module other than the denoiser.
    """
    assigned = {name: value for name, value in vars(pipeline).items() if isinstance(value, Denoiser)}
    for name, denoiser in assigned.items():
        if denoiser_module(pipeline) is not denoiser.model:
            raise HarmonicaError(
                f"{type(pipeline).__name__}.{name} is a compiled model, but this pipeline has another denoiser, and "
                f"only the denoiser can be compiled. Restore the plain model: pipe.{name} = pipe.{name}.model"
            )
        install(pipeline, denoiser)
        setattr(pipeline, name, denoiser.given)  # last: if interrupted before, the next call still finds it assigned


def uninstall(pipeline: Any) -> None:
    """Restore the plain module and scheduler of the pipeline, and of all pipelines that share the module.

    Does nothing if nothing was installed.
    """
    module, left_over = denoiser_module(pipeline), _left_over(pipeline)
    sharing = [one for before in (installed(module), left_over) if before is not None for one in before.pipelines]
    for wrapper in (wrapper for one in (pipeline, *sharing) for wrapper in compiled_around(held_denoiser(one))):
        if isinstance(wrapper.__dict__.get("_compiled_call_impl"), _NotTraced):
            del wrapper.__dict__["_compiled_call_impl"]
    for before in (installed(module), left_over):
        if before is None:
            continue
        if before.model is not module and any(one is not pipeline for one in before.pipelines):
            before.leave(pipeline)  # other pipelines still run it
            continue
        if installed(before.model) is before:  # first: a denoiser that is called but follows no pipeline miscounts
            del before.model._compiled_call_impl
        before.detach()
    if left_over is not None and not left_over.pipelines and listener_of(pipeline.scheduler) is left_over:
        unwatch(
            pipeline.scheduler
        )  # it was interrupted after it watched the scheduler, before it followed the pipeline


def _left_over(pipeline: Any) -> Denoiser | None:
    """A denoiser that still follows this pipeline's scheduler after its module was replaced or its pipeline deleted."""
    listener = listener_of(pipeline.scheduler)
    if not isinstance(listener, Denoiser):
        return None
    followed = listener.pipelines
    return listener if not followed or any(one is pipeline for one in followed) else None


def put_temporarily(pipeline: Any, denoiser: Denoiser | None, changes: Changes) -> None:
    """Run `denoiser` (None: the plain module) in the pipeline until `changes` are undone; undoing restores what ran."""
    before = installed(denoiser_module(pipeline))
    changes.undone_by(functools.partial(_put_back, pipeline, before, before.pipelines if before is not None else []))
    if denoiser is None:
        uninstall(pipeline)
    else:
        install(pipeline, denoiser)


def _put_back(pipeline: Any, denoiser: Denoiser | None, followed: list[Any]) -> None:
    uninstall(pipeline)
    if denoiser is not None:
        install(pipeline, denoiser)
        for other in followed:
            denoiser.attach(other)
