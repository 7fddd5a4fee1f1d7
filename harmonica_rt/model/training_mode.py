"""Modules left in training mode: allowed if they compute the same as in evaluation mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from harmonica_rt.errors import CaptureError, CaptureFailure, Obstacle

_SWITCHES = ("p", "dropout_p", "drop_p", "train", "training")  # if one of these is zero or False, nothing is drawn


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Module path -> whether that module is in training mode."""
    return {path: module.training for path, module in model.named_modules()}


def check_draws_nothing(graph: fx.Graph, modes: Mapping[str, bool]) -> None:
    """Raise CaptureError if a module left in training mode draws random numbers.

    Modules in training mode are common in a model in evaluation mode: a LoRA's layers stay as they were made. Most
    compute the same in both modes; those that train statistics change buffers, which is an obstacle of its own.

    Args:
        graph: the model's graph.
        modes: from `modes_of`. A path that is not in it (dynamo formats paths differently) counts as in training mode.
    """
    for node in graph.nodes if any(modes.values()) else ():
        if draws_numbers(node):
            paths = [path.partition("@")[0] for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            path = paths[-1] if paths else ""
            if modes.get(path, True):
                raise CaptureError(CaptureFailure(Obstacle.TRAINING, "call model.eval() first", node=path or node.name))


def draws_numbers(node: fx.Node) -> bool:
    """Whether the node's operator draws random numbers; attention and dropout only do so with a nonzero probability."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    arguments = target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments}
    given.update(zip((argument.name for argument in arguments), node.args, strict=False))
    given.update(node.kwargs)
    return all(given.get(name, True) for name in _SWITCHES)
