"""Runs a model in the next higher precision throughout.

A model converted to float64 does not compute in float64 where its code names float32: `.float()` around a norm or a
rotation, `torch.arange` in the default dtype. Such a ground truth shares the rounding of the output it judges, or fails
at the first product of the two dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Promoted(TorchDispatchMode):
    """A mode that replaces dtype `low` by `high` in operator inputs, outputs and dtype arguments, complex included."""

    supports_higher_order_operators = True

    def __init__(self, low: torch.dtype, high: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes = {low: high}
        if low in _COMPLEX:
            self._dtypes[_COMPLEX[low]] = _COMPLEX[high]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, so that flex attention, which compiles itself unasked, works within this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`. In-place operators run unchanged, so that they write to their given targets."""
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(self._raise, (args, kwargs))
        return pytree.tree_map(self._raise, func(*args, **kwargs))

    def _raise(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._dtypes.get(value, value)
        if isinstance(value, torch.Tensor) and value.dtype in self._dtypes:
            return value.to(self._dtypes[value.dtype])
        return value
