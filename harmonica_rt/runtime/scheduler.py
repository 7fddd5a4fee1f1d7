"""Know when a run begins and when a step is over, from the diffusers scheduler that drives it.

A pipeline tells nobody which step it is in, but every one calls `scheduler.set_timesteps` once a run and
`scheduler.step` once a step. Both are watched by giving the scheduler object a subclass of its own class: the class
keeps its name, module and signatures (pipelines inspect those of `step`). A copy or a pickle is of the original class,
and what `from_config` makes has no listener, so neither ever drives the wrong run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from harmonica_rt.errors import HarmonicaError


class Listener(Protocol):
    """What a watched scheduler tells.

    Attributes:
        undone_by: the call that makes it stop listening, for messages.
    """

    undone_by: str

    def run_begins(self, scheduler: Any) -> None:
        """`set_timesteps` is about to be called."""

    def step_begins(self, scheduler: Any, timestep: Any) -> None:
        """`step` is about to be called with this timestep. May raise to prevent it."""

    def step_ends(self, scheduler: Any) -> None:
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


@dataclass(frozen=True)
class RunTimesteps:
    """The timesteps of a run: the scheduler's own tensor `[steps]` (or its end), and a copy of it on the CPU."""

    own: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, scheduler: Any, first: int = 0) -> RunTimesteps | None:
        """Those from index `first` on that `scheduler` is set for; None where it tells none.

        Copying waits for a GPU, once a run.
        """
        own = getattr(scheduler, "timesteps", None)
        if not isinstance(own, torch.Tensor) or own.dim() != 1:
            return None
        return cls(own[first:], own[first:].cpu())

    @property
    def key(self) -> tuple[float, ...]:
        """Their values: runs of equal ones are alike."""
        return tuple(self.known.tolist())

    def belongs_to_another(self, timestep: Any, step: int) -> bool:
        """Whether `timestep` is that of another step than this one. False when in doubt.

        Reading a value on a GPU would wait for it. Pipelines step with elements of the scheduler's own tensor, though,
        and which element one is, its address tells.
        """
        known = self.known
        if step >= len(known):
            return False
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                return False
            if timestep.device.type == "cpu":
                timestep = timestep.item()
            else:
                index = self.position(timestep)
                return index is not None and bool(known[index] != known[step])
        if not isinstance(timestep, (int, float)) or float(known[step]) == timestep:
            return False
        return bool((known == timestep).any())

    def position(self, timestep: torch.Tensor) -> int | None:
        """Which element of the scheduler's tensor a tensor is; None for one with memory of its own."""
        own = self.own
        if timestep.dtype != own.dtype or timestep.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        index, rest = divmod(int(timestep.storage_offset() - own.storage_offset()), max(own.stride(0), 1))
        return index if rest == 0 and 0 <= index < len(own) else None


def steps_left_out(scheduler: Any) -> int:
    """How many of its first steps the run leaves out, as image-to-image tells its scheduler with `set_begin_index`."""
    return int(getattr(scheduler, "begin_index", None) or 0)


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
        listener.step_begins(self, timestep)
        result = cls.step(self, model_output, timestep, *args, **kwargs)
        listener.step_ends(self)
        return result

    return step


def _watched_set_timesteps(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener = listener_of(self)
        if listener is not None:
            listener.run_begins(self)
        return cls.set_timesteps(self, *args, **kwargs)

    return set_timesteps
