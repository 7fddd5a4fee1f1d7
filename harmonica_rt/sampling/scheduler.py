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
from typing import Any, Protocol

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
_set_class = vars(object)["__class__"].__set__  # plain assignment would fail: a watched class has a property instead


def watch(scheduler: Any, listener: Listener) -> None:
    """Notify `listener` of the runs and steps of `scheduler` from now on.

    Raises:
        HarmonicaError: it has no `set_timesteps` or `step`, or Python does not allow its methods to be watched.
    """
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise HarmonicaError(f"{type(scheduler).__name__} has no {method}(), which every diffusers scheduler has")
    unwatch(scheduler)
    original: Any = type(scheduler)
    try:
        _set_class(scheduler, _watched_class(original, scheduler, listener))
    except TypeError as error:
        raise HarmonicaError(
            f"the steps of a {original.__name__} cannot be watched ({error}): its class must be an ordinary Python "
            "class without __slots__. Wrap it in an object of such a class, or compile the model itself and call "
            "reset() for each run"
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
        self._reporting = threading.local()

    def calls(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the scheduler and report it once, even if one version of the method calls another."""
        scheduler = self.scheduler()
        if getattr(self._reporting, name, False):
            return method(*args, **kwargs)
        changes = Changes()
        with changes, changes:
            changes.set(self._reporting.__dict__, name, True)
            if name == "set_timesteps":
                self.listener.run_begins(scheduler)
                return method(*args, **kwargs)
            self.listener.step_begins(scheduler, args[1] if len(args) > 1 else kwargs.get("timestep"))
            result = method(*args, **kwargs)
            self.listener.step_ends(scheduler)
            return result


class _ReportedMethod:
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
            delegate: Callable[[Any, str], Any] = inspect.getattr_static(watched.original, "__getattr__")
            method = delegate(scheduler, name)
        if watched.scheduler() is not scheduler:
            return method

        @functools.wraps(method)
        def reported(*args: Any, **kwargs: Any) -> Any:
            return watched.calls(name, method, args, kwargs)

        return reported

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
    methods = {name: _ReportedMethod(watched, name) for name in ("step", "set_timesteps")}
    members: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__class__": property(lambda _: original),
        "__reduce_ex__": _reduce_to(original),
        **methods,
        _WATCH: watched,
    }
    metaclass: Any = type(original)
    found: type = metaclass(original.__name__, (original,), members)
    for method in methods.values():
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
