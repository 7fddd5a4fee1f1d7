"""Runs a graph traced by torch.compile node by node, so that it can be traced again for a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


class Replay(nn.Module):
    """Runs a dynamo graph node by node, so that a trace of it keeps the module of each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self._interpreter = _Interpreter(module)

    def forward(self, *values: Any) -> Any:
        """The graph's outputs."""
        with fx.traceback.preserve_node_meta():
            return self._interpreter.run(*values)


class _Interpreter(fx.Interpreter):
    """Runs a dynamo graph in the form that a plan needs: for inference, with the numbers of one call.

    Changes of grad mode are left out: they would become nested graphs. Dynamo passes a symbolic float as a tensor, and
    the graph calls its `item()`; here it is a float.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `fx.Interpreter.call_function`."""
        if target is torch._C._set_grad_enabled:
            return None
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `fx.Interpreter.call_method`."""
        if target == "item" and isinstance(args[0], (int, float)):
            return args[0]
        return super().call_method(target, args, kwargs)
