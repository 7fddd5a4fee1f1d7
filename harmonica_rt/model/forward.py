"""The model's own forward, beneath everything that others put around it.

Hooks of the model itself run around a plan, not inside it. So capture and the reference use the forward underneath: not
a call installed in the module's place, not torch's forward hooks, not accelerate's wrapper.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

from torch import nn

from harmonica_rt.changes import Changes, in_this_thread
from harmonica_rt.model.hooks import FORWARD_HOOKS, accelerate_hook


class Swapped:
    """A callable that temporarily replaces another one, for one thread, and knows its original.

    Args:
        call: the replacement.
        original: the callable that it replaces.
        elsewhere: what other threads run in the meantime; `original` unless given.
    """

    def __init__(
        self, call: Callable[..., Any], original: Callable[..., Any], elsewhere: Callable[..., Any] | None = None
    ) -> None:
        self._call = in_this_thread(call, elsewhere or original)
        self.original = self.__wrapped__ = original  # the latter for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replacement; in another thread, `elsewhere`."""
        return self._call(*args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """The original's code, for torch.export, which records where a forward is defined."""
        code = getattr(inspect.unwrap(self.original), "__code__", None)
        return code if isinstance(code, CodeType) else Swapped.__call__.__code__

    def retire(self) -> None:
        """Run the original from now on, since others may have wrapped this object and keep it."""
        self._call = self.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the original: a copy of the model gets its own forward, not the replacement and all that it holds."""
        return copy.deepcopy(self.original, memo)


def forward_attribute(model: nn.Module) -> str:
    """The attribute that holds the innermost forward of `model`: accelerate renames it when it wraps a module."""
    return "_old_forward" if accelerate_hook(model) is not None else "forward"


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """The innermost forward of `model`: that of its class, unless it was replaced on the object."""
    found = model.__dict__.get(forward_attribute(model))
    if isinstance(found, Swapped):
        return found.original
    if found is None:
        return MethodType(type(model).forward, model)
    return found  # type: ignore[no-any-return]


def keep_only_own_forward(model: nn.Module, changes: Changes) -> None:
    """Make calls of `model` by this thread run only its own forward, until `changes` are undone.

    Calls by other threads wait until then, since a trace takes parameters out of the model and puts them back. Take the
    capture lock first, or two threads may wait for each other.

    Torch calls a module's `_compiled_call_impl`, if it is set, and otherwise `_call_impl`, which runs the hooks and
    `forward`; so the former is where calls are redirected.
    """
    held, over = model.__dict__, threading.Event()

    def afterwards(*args: Any, **kwargs: Any) -> Any:
        over.wait()
        return model(*args, **kwargs)

    changes.undone_by(over.set)
    before = held.get("_compiled_call_impl") or model._call_impl
    changes.set(held, "_compiled_call_impl", Swapped(model._call_impl, before, afterwards))
    changes.set(held, "forward", own_forward(model))
    for hooks in FORWARD_HOOKS:
        changes.set(held, hooks, OrderedDict())
