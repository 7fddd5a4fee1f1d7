"""Tensors that say they lie on `cuda:0` and have values: for models that ask for values of their request.

Fake tensors have no values. When a model asks for one while it is traced, capture evaluates the trace so far on the
leaves of the call; with these leaves it does so on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

DEVICE = torch.device("cuda:0")


class Valued(torch.Tensor):
    """A tensor on the CPU under another device's name; so is whatever an operator makes of it."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Valued:
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=DEVICE
        )
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Valued, lambda tensor: tensor.value, (args, kwargs or {}))
        to_cpu = torch.device(kwargs.get("device") or DEVICE).type == "cpu"
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        return result if to_cpu else pytree.tree_map_only(torch.Tensor, cls, result)
