"""Excludes functions from torch.compile without loading or running dynamo elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

C = TypeVar("C", bound=Callable[..., Any])


def outside_dynamo(call: C) -> C:
    """`call`, excluded from torch.compile: a plan is already compiled, and a trace would bake in the state of a run.

    Dynamo traces only the branch that disables it. Outside dynamo, nothing of dynamo is imported or run:
    while another thread exports a model, a disabled function writes to a process-wide dict, and fails if two threads
    do so.
    """
    untraced: list[Callable[..., Any]] = []

    @functools.wraps(call)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return call(*args, **kwargs)
        if not untraced:
            untraced.append(torch.compiler.disable(call))
        return untraced[0](*args, **kwargs)

    return outer  # type: ignore[return-value]
