"""Run a model one precision up, through and through.

A model converted to float64 is not computed in float64 where its code names float32: `.float()` around a norm or a
rotation, `torch.arange` in the default dtype. Such a truth shares the rounding of what it is to judge, or fails at the
first product of the two dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class Promoted(TorchDispatchMode):
    """Within it no operator takes, makes or is asked for `low`: it is `high` everywhere, complex numbers included."""

    supports_higher_order_operators = True

    def __init__(self, low: torch.dtype, high: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes = {low: high}
        if low in _COMPLEX:
            self._dtypes[_COMPLEX[low]] = _COMPLEX[high]

    @classmethod
    def is_infra_mode(cls) -> bool:
        """So that flex attention, which compiles itself also where nobody asked, goes ahead within it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`. Operators that write in place are left to write where they were told to."""
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
