"""The model's own forward, beneath everything that others put around it.

Hooks of the model itself run around a plan, not inside it; so what is captured, and what the reference runs, is the
forward under them: not a call installed in the module's place, not torch's forward hooks, not accelerate's wrapper.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from harmonica_rt.changes import Changes


class Swapped:
    """A call that stands in the place of a forward for a while, and knows what it stands for."""

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        self._call = call
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stand-in."""
        return self._call(*args, **kwargs)

    def retire(self) -> None:
        """From now on it is what it stood for: whoever wrapped it meanwhile keeps it."""
        self._call = self.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model made meanwhile has its own forward, not the stand-in and all that it holds on to."""
        return copy.deepcopy(self.original, memo)


def forward_attribute(model: nn.Module) -> str:
    """Where the innermost forward of `model` is kept: accelerate moves it aside when it wraps a module."""
    return "_old_forward" if model.__dict__.get("_hf_hook") is not None else "forward"


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """The innermost forward of `model`: its class's, unless somebody replaced it on the object."""
    found = model.__dict__.get(forward_attribute(model))
    if isinstance(found, Swapped):
        return found.original
    if found is None:
        return MethodType(type(model).forward, model)
    return found  # type: ignore[no-any-return]


def keep_only_own_forward(model: nn.Module, changes: Changes) -> None:
    """Let a call of `model` run its own forward and nothing else until `changes` are undone."""
    held = model.__dict__
    changes.set(held, "forward", own_forward(model))
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        changes.set(held, hooks, OrderedDict())
    if "_compiled_call_impl" in held:
        changes.set(held, "_compiled_call_impl", None)
