"""Replaces the forward of a module for a while; replacements may nest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from harmonica_rt.changes import Changes


def replace_forward(module: nn.Module, forward: Callable[..., Any], changes: Changes) -> None:
    """Let calls of `module` run `forward`, inside the hooks of the module, until `changes` are undone."""
    replacement = _Replacement(forward, own_forward(module))
    if "_compiled_call_impl" in module.__dict__:
        changes.set(module.__dict__, "_compiled_call_impl", None)
    changes.set(module.__dict__, "forward", replacement)


class _Replacement:
    """Replaces a forward and remembers the original, since replacements may nest."""

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        self._call = call
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module; the original one while it is replaced."""
    forward: Callable[..., Any] = module.forward
    return forward.original if isinstance(forward, _Replacement) else forward
