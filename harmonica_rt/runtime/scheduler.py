"""Know when a run begins and when a step is over, from the diffusers scheduler that drives it.

A pipeline tells nobody which step it is in, but every one calls `scheduler.set_timesteps` once a run and
`scheduler.step` once a step. Both are watched by giving the scheduler object a subclass of its own class: the class
keeps its name, module and signatures (pipelines inspect those of `step`). A copy or a pickle is of the original class,
and what `from_config` makes has no listener, so neither ever drives the wrong run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from harmonica_rt.errors import HarmonicaError


class Listener(Protocol):
    """What a watched scheduler tells."""

    def run_begins(self) -> None:
        """`set_timesteps` is about to be called."""

    def step_begins(self, timestep: Any) -> None:
        """`step` is about to be called with this timestep. May raise to prevent it."""

    def step_ends(self) -> None:
        """`step` returned."""


_LISTENER = "_harmonica_listener"
_ORIGINAL = "_harmonica_original"


def watch(scheduler: Any, listener: Listener) -> None:
    """Tell `listener` of the runs and steps of `scheduler` from now on."""
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise HarmonicaError(f"{type(scheduler).__name__} has no {method}(); a diffusers scheduler has")
    unwatch(scheduler)
    cls: Any = _original_class(type(scheduler))
    object.__setattr__(scheduler, "__class__", _watched_class(cls))
    scheduler.__dict__[_LISTENER] = listener


def unwatch(scheduler: Any) -> None:
    """Undo `watch`; nothing happens where there is nothing to undo."""
    scheduler.__dict__.pop(_LISTENER, None)
    object.__setattr__(scheduler, "__class__", _original_class(type(scheduler)))


def listener_of(scheduler: Any) -> Listener | None:
    """Who is told of the runs of `scheduler`."""
    found: Listener | None = getattr(scheduler, "__dict__", {}).get(_LISTENER)
    return found


def is_another_step(timestep: Any, timesteps: torch.Tensor | None, step: int) -> bool:
    """Whether a scheduler was stepped with the timestep of another step than its `step`-th. False when in doubt.

    `timesteps` lie on the CPU; a timestep on a GPU is not looked at, since reading it would wait for it.
    """
    if timesteps is None or step >= len(timesteps):
        return False
    if isinstance(timestep, torch.Tensor):
        if timestep.device.type != "cpu" or timestep.numel() != 1:
            return False
        timestep = timestep.item()
    if not isinstance(timestep, (int, float)) or float(timesteps[step]) == timestep:
        return False
    return bool((timesteps == timestep).any())


def _original_class(cls: Any) -> Any:
    """A scheduler made with `from_config` of a watched one has the watched class too."""
    return cls.__dict__.get(_ORIGINAL, cls)


@functools.cache
def _watched_class(cls: Any) -> type:
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _ORIGINAL: cls,
        "__reduce_ex__": _reduce_to(cls),
        "step": _watched_step(cls),
        "set_timesteps": _watched_set_timesteps(cls),
    }
    metaclass: Any = type(cls)
    watched: type = metaclass(cls.__name__, (cls,), members)
    return watched


def _reduce_to(cls: type) -> Callable[[Any, int], Any]:
    def reduce_ex(self: Any, protocol: int) -> Any:
        """Copies and pickles are plain, unwatched schedulers."""
        state = {name: value for name, value in self.__dict__.items() if name != _LISTENER}
        return (_new_instance, (cls,), state)

    return reduce_ex


def _new_instance(cls: Any) -> Any:
    return cls.__new__(cls)


def _watched_step(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.step)
    def step(self: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        listener = listener_of(self)
        if listener is None:
            return cls.step(self, model_output, timestep, *args, **kwargs)
        listener.step_begins(timestep)
        result = cls.step(self, model_output, timestep, *args, **kwargs)
        listener.step_ends()
        return result

    return step


def _watched_set_timesteps(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener = listener_of(self)
        if listener is not None:
            listener.run_begins()
        return cls.set_timesteps(self, *args, **kwargs)

    return set_timesteps
