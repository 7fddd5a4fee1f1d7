"""The model's own forward, beneath everything that others put around it.

Hooks of the model itself run around a plan, not inside it; so what is captured, and what the reference runs, is the
forward under them: not a call installed in the module's place, not torch's forward hooks, not accelerate's wrapper.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

_SET_ASIDE = ("_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl", "forward")


class Swapped:
    """A call that stands in the place of a forward for a while, and knows what it stands for."""

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        self._call = call
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stand-in."""
        return self._call(*args, **kwargs)


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


@contextmanager
def only_own_forward(model: nn.Module) -> Iterator[None]:
    """Within this block a call of `model` runs its own forward and nothing else."""
    forward = own_forward(model)
    before = {name: model.__dict__[name] for name in _SET_ASIDE if name in model.__dict__}
    model.__dict__.pop("_compiled_call_impl", None)
    model.__dict__.update(forward=forward, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    try:
        yield
    finally:
        for name in _SET_ASIDE:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
