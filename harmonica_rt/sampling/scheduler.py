"""Detects when a run begins and when a step ends, from the diffusers scheduler that drives it.

A pipeline does not announce which step it is in, but every pipeline calls `scheduler.set_timesteps` once per run and
`scheduler.step` once per step. Both are watched by giving the scheduler object a subclass of its class, made for this
one object. The subclass keeps the name, module and signatures (pipelines inspect those of `step`), and it alone holds
the listener, so the object's attributes stay as they were. A copy or a pickle has the original class, and an object
made by `from_config` has no listener, so neither ever drives the wrong run.

Other code replaces `step` on the object too, before it is watched or later. The subclass defines both methods as data
descriptors, which take precedence over an object's attributes, so the calls are reported whatever runs behind them.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from harmonica_rt.changes import Changes
from harmonica_rt.errors import HarmonicaError


class Listener(Protocol):
    """Receives the events of a watched scheduler.

    Attributes:
        undone_by: the call that makes the listener stop listening, for messages.
    """

    undone_by: str

    def run_begins(self, scheduler: Any) -> None:
        """`set_timesteps` is about to be called."""

    def step_begins(self, scheduler: Any, timestep: Any) -> None:
        """`step` is about to be called with this timestep. May raise to prevent it."""

    def step_ends(self, scheduler: Any) -> None:
        """`step` returned."""


_WATCH = "_harmonica_watch"
_set_class = vars(object)["__class__"].__set__  # the watched class reports the original class as its `__class__`


def watch(scheduler: Any, listener: Listener) -> None:
    """Notify `listener` of the runs and steps of `scheduler` from now on.

    Raises:
        HarmonicaError: it has no `set_timesteps` or `step`, or Python does not allow its methods to be watched.
    """
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise HarmonicaError(f"{type(scheduler).__name__} has no {method}(); a diffusers scheduler has")
    unwatch(scheduler)
    original: Any = type(scheduler)
    try:
        _set_class(scheduler, _watched_class(original, scheduler, listener))
    except TypeError as error:
        raise HarmonicaError(
            f"the steps of a {original.__name__} cannot be watched ({error}): its class must be an ordinary Python "
            "class without __slots__. Put it in an object of one, or compile the model itself and call reset() for "
            "each run"
        ) from error


def unwatch(scheduler: Any) -> None:
    """Undo `watch`; does nothing if the scheduler is not watched."""
    watched = _watch_of(scheduler)
    if watched is not None:
        _set_class(scheduler, watched.original)


def listener_of(scheduler: Any) -> Listener | None:
    """The listener to the runs of `scheduler`, or None."""
    watched = _watch_of(scheduler)
    return watched.listener if watched is not None and watched.scheduler() is scheduler else None


@dataclass(frozen=True)
class RunTimesteps:
    """The timesteps of a run: the scheduler's own tensor `[steps]` (or its end), and a copy of it on the CPU."""

    own: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, scheduler: Any, first: int = 0) -> RunTimesteps | None:
        """The timesteps that `scheduler` is set to, from index `first` on; None if it has none.

        The copy waits for the GPU, once per run.
        """
        own = getattr(scheduler, "timesteps", None)
        if not isinstance(own, torch.Tensor) or own.dim() != 1:
            return None
        return cls(own[first:], own[first:].cpu())

    @property
    def key(self) -> tuple[float, ...]:
        """The values of the timesteps; runs with equal values are alike."""
        return tuple(self.known.tolist())

    def belongs_to_another(self, timestep: Any, step: int) -> bool:
        """Whether `timestep` belongs to a step other than `step`. False when in doubt.

        Reading a value on a GPU would wait for it. But pipelines step with elements of the scheduler's own tensor, and
        the address of an element gives its index.
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
        """The index of a tensor that is an element of the scheduler's tensor; None if it has its own memory."""
        own = self.own
        if timestep.dtype != own.dtype or timestep.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        index, rest = divmod(int(timestep.storage_offset() - own.storage_offset()), max(own.stride(0), 1))
        return index if rest == 0 and 0 <= index < len(own) else None


def timesteps_are_set(scheduler: Any) -> bool:
    """Whether timesteps were set for sampling. A new diffusers scheduler has none, or all its training timesteps."""
    timesteps = getattr(scheduler, "timesteps", None)
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    asked = getattr(scheduler, "num_inference_steps", None) or (len(timesteps) if timesteps is not None else trained)
    return timesteps is not None and asked != trained


def steps_left_out(scheduler: Any) -> int:
    """How many first steps the run skips; image-to-image tells its scheduler so with `set_begin_index`."""
    return int(getattr(scheduler, "begin_index", None) or 0)


class _Watch:
    """The listener and the original class of one scheduler object.

    Attributes:
        scheduler: a weak reference; other objects of the watched class (`from_config` makes some) are not reported.
        listener: the listener to notify.
        original: the class that the scheduler had.
    """

    def __init__(self, scheduler: Any, listener: Listener, original: type) -> None:
        self.scheduler = weakref.ref(scheduler)
        self.listener = listener
        self.original = original
        self._telling = threading.local()

    def calls(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the scheduler and report it once, even if one version of the method calls another."""
        scheduler = self.scheduler()
        if getattr(self._telling, name, False):
            return method(*args, **kwargs)
        changes = Changes()
        with changes, changes:
            changes.set(self._telling.__dict__, name, True)
            if name == "set_timesteps":
                self.listener.run_begins(scheduler)
                return method(*args, **kwargs)
            self.listener.step_begins(scheduler, args[1] if len(args) > 1 else kwargs.get("timestep"))
            result = method(*args, **kwargs)
            self.listener.step_ends(scheduler)
            return result


class _Told:
    """A method of a watched class, in place of the original class's or the object's own."""

    def __init__(self, watched: _Watch, name: str) -> None:
        self._watch, self._name = watched, name
        self.owner: type  # not by `__set_name__`: Python turns a Ctrl-C there into a RuntimeError

    def __get__(self, scheduler: Any, owner: Any = None) -> Any:
        name, watched = self._name, self._watch
        if scheduler is None:
            return getattr(watched.original, name)
        method = vars(scheduler).get(name) or getattr(super(self.owner, scheduler), name, None)
        if method is None:  # a wrapper that delegates what it lacks
            hand_on: Callable[[Any, str], Any] = inspect.getattr_static(watched.original, "__getattr__")
            method = hand_on(scheduler, name)
        if watched.scheduler() is not scheduler:
            return method

        @functools.wraps(method)
        def told(*args: Any, **kwargs: Any) -> Any:
            return watched.calls(name, method, args, kwargs)

        return told

    def __set__(self, scheduler: Any, value: Any) -> None:
        vars(scheduler)[self._name] = value

    def __delete__(self, scheduler: Any) -> None:
        try:
            del vars(scheduler)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None


def _watch_of(scheduler: Any) -> _Watch | None:
    found: _Watch | None = vars(type(scheduler)).get(_WATCH)
    return found


def _watched_class(original: Any, scheduler: Any, listener: Listener) -> type:
    """A subclass for one object. A scheduler made by `from_config` of a watched one may share its class."""
    watched = _Watch(scheduler, listener, original)
    told = {name: _Told(watched, name) for name in ("step", "set_timesteps")}
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__class__": property(lambda _: original),
        "__reduce_ex__": _reduce_to(original),
        **told,
        _WATCH: watched,
    }
    metaclass: Any = type(original)
    found: type = metaclass(original.__name__, (original,), members)
    for method in told.values():
        method.owner = found
    return found


def _reduce_to(original: Any) -> Callable[[Any, Any], Any]:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Copies and pickles are plain, unwatched schedulers."""
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, str):
            return reduced
        made, arguments, *state = reduced
        return (made, tuple(original if a is type(self) else a for a in arguments), *state)

    return reduce_ex
