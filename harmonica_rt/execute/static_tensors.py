"""Tensors at fixed addresses: changing values are copied into them, and CUDA graphs read them there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harmonica_rt.call.roles import Role
from harmonica_rt.graph.layout import distinct, expanded_dims


class StaticTensors:
    """One tensor at a fixed address per name, with the layout of the first value given under that name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(distinct(tensor).nbytes for tensor in self.tensors.values())

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy each value to the tensor of its name; one call per dtype, which takes few launches on a GPU."""
        for name, value in values.items():
            if name not in self.tensors:
                self.tensors[name] = _empty(value)
        for copied in _copies({name: self.tensors[name] for name in values}):
            copied.run(values)

    def put_joined(self, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Copy the parts of each tensor, which lie one below the other in it; one call for all."""
        targets: list[torch.Tensor] = []
        for name, given in parts.items():
            heights = [len(part) for part in given]
            if name not in self.tensors:
                with torch.inference_mode(False), torch.no_grad():
                    self.tensors[name] = given[0].new_empty((sum(heights), *given[0].shape[1:]))
            targets += self.tensors[name].split(heights)
        if targets:
            torch._foreach_copy_(targets, [part for given in parts.values() for part in given])


class StaticLeaves:
    """The tensors of a stream's calls at fixed addresses.

    Those of the request are copied once per request, the others at every call.

    Args:
        indices: the leaves to hold.
        roles: the role of each leaf of a call.

    Attributes:
        tensors: the tensor of each leaf; None for leaves that are not held, and before the first call.
    """

    def __init__(self, indices: Collection[int], roles: Sequence[Role]) -> None:
        self.tensors: list[torch.Tensor | None] = [None] * len(roles)
        self._request = [index for index in indices if roles[index] is Role.REQUEST]
        self._changing = [index for index in indices if roles[index] is not Role.REQUEST]
        self._copies_of_request: list[_Copies] = []
        self._copies_of_call: list[_Copies] | None = None
        self._has_request = False

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """All of them."""
        return (tensor for tensor in self.tensors if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(distinct(tensor).nbytes for tensor in self.held)

    def begin(self) -> None:
        """The next call belongs to another request."""
        self._has_request = False

    def put(self, leaves: Sequence[Any]) -> None:
        """Copy the leaves of a call."""
        if self._copies_of_call is None:
            for index in (*self._request, *self._changing):
                self.tensors[index] = _empty(leaves[index])
            self._copies_of_request, self._copies_of_call = map(self._copies, (self._request, self._changing))
        for copied in self._copies_of_call:
            copied.run(leaves)
        if not self._has_request:
            for copied in self._copies_of_request:
                copied.run(leaves)
            self._has_request = True

    def _copies(self, indices: Sequence[int]) -> list[_Copies]:
        return _copies({index: tensor for index in indices if (tensor := self.tensors[index]) is not None})


@dataclass(frozen=True, eq=False)
class _Copies:
    """Copies to tensors of one dtype, made by one call.

    Attributes:
        keys: what to copy: keys or indices.
        targets: the tensor for each, without repeated elements.
        expanded: for each tensor that has repeated elements, its position and the tensor.
    """

    keys: list[Any]
    targets: list[torch.Tensor]
    expanded: list[tuple[int, torch.Tensor]]

    def run(self, values: Any) -> None:
        """Copy `values[key]` for each key."""
        sources = [values[key] for key in self.keys]
        for position, target in self.expanded:
            sources[position] = distinct(sources[position], target)
        if len(sources) == 1:  # half the time of a list of one
            self.targets[0].copy_(sources[0])
        else:
            torch._foreach_copy_(self.targets, sources)


def _copies(targets: Mapping[Any, torch.Tensor]) -> list[_Copies]:
    found: dict[torch.dtype, _Copies] = {}
    for key, target in targets.items():
        copied = found.setdefault(target.dtype, _Copies([], [], []))
        if expanded_dims(target):
            copied.expanded.append((len(copied.keys), target))
        copied.keys.append(key)
        copied.targets.append(distinct(target))
    return list(found.values())


def _empty(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
