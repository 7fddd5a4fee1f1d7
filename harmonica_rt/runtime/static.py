"""Tensors that stay where they are, and that changing values are copied into."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


class StaticTensors:
    """One tensor at a fixed address for each name.

    Args:
        trusted: a value that is the same object as the last one under its name has not changed; it is not copied again.
    """

    def __init__(self, *, trusted: bool) -> None:
        self._trusted = trusted
        self._fixed: dict[Any, _Fixed] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(fixed.elements.nbytes for fixed in self._fixed.values())

    def put(self, values: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Copy each value under its name, whose layout it has from then on; the tensors at fixed addresses.

        Values of one dtype are copied in one call, which a GPU turns into few launches.
        """
        targets: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, value in values.items():
            fixed = self._fixed.get(name)
            if fixed is None:
                fixed = self._fixed[name] = _Fixed(value)
            elif self._trusted and fixed.last is value:
                continue
            fixed.last = value
            to, of = targets.setdefault(value.dtype, ([], []))
            to.append(fixed.elements)
            of.append(distinct(value))
        for to, of in targets.values():
            torch._foreach_copy_(to, of)
        return {name: self._fixed[name].tensor for name in values}


class _Fixed:
    def __init__(self, value: torch.Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            self.elements = distinct(self.tensor)
        self.last: torch.Tensor | None = None


def distinct(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the repetitions of expanded dimensions: every element that there is, once."""
    for dim, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and n > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
