"""Refuses inputs of which the caller could expect gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from harmonica_rt.errors import RunError


def check_no_gradient(named: Iterable[tuple[str, Any]]) -> None:
    """Raise RunError if the caller could expect the result for these named values to carry a gradient."""
    if not torch.is_grad_enabled():
        return
    for name, value in named:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RunError(
                f"{name} requires a gradient, but the results of a compiled model carry none. Call the model under "
                "torch.no_grad(), pass a detached tensor, or use the plain model (uncompile the pipeline)"
            )
