"""The tensors of a model: its parameters and buffers by name, and the inner tensors of quantised ones."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harmonica_kernels import extension_module


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by dotted name; a shared one appears under each of its names.

    One that wraps others (a quantised parameter) comes with its inner tensors, under the names torch.export gives them.
    """
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in list(found.items()):
        path, _, own = name.rpartition(".")
        for index, inner in enumerate(inner_tensors(tensor)):
            found[f"{path}{'.' if path else ''}parametrizations.{own}.original{index}"] = inner
    return found


def inner_tensors(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that a wrapper tensor is made of, in the order of torch.export; empty for a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return []
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [inner for part in parts for inner in (inner_tensors(part) or [part])]


def same_objects(some: Collection[object], others: Collection[object]) -> bool:
    """Whether two collections hold the very same objects in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def shared_names(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """For each tensor with several names, its other names -> its first name."""
    first: dict[int, str] = {}
    return {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}


def plain_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that are attributes of modules but neither parameters nor buffers, by dotted name."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if isinstance(value, torch.Tensor)
    }


class Metadata(NamedTuple):
    """A tensor's metadata. Shape and strides are None where it has none (nested, sparse)."""

    shape: tuple[int, ...] | None
    strides: tuple[int, ...] | None
    layout: torch.layout
    dtype: torch.dtype
    device: torch.device
    kind: type
    parts: tuple[Metadata, ...]  # of its inner tensors

    def __str__(self) -> str:
        shape = "nested" if self.shape is None else str(list(self.shape))
        return f"{shape} {str(self.dtype).removeprefix('torch.')} on {self.device}"


def metadata(tensor: torch.Tensor) -> Metadata:
    """The metadata of a tensor."""
    shape = None if tensor.is_nested else tuple(tensor.shape)
    strides = tensor.stride() if shape is not None and tensor.layout is torch.strided else None
    parts = tuple(map(metadata, inner_tensors(tensor)))
    return Metadata(shape, strides, tensor.layout, tensor.dtype, tensor.device, type(tensor), parts)


def _has_address(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a data address: one that wraps others, or is sparse, oneDNN's or the like, has none."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided


def _versions_of(tensors: list[torch.Tensor], kind: type) -> bytes:
    return array("Q", map(_version, tensors)).tobytes()


def _addresses_of(tensors: list[torch.Tensor], kind: type) -> bytes:
    return array("Q", map(kind.data_ptr, tensors)).tobytes()  # type: ignore[attr-defined]


_version = operator.attrgetter("_version")
_read_versions = getattr(extension_module(), "versions_of", _versions_of)
_read_addresses = getattr(extension_module(), "addresses_of", _addresses_of)


class TensorNote:
    """Notes, for some tensors, their versions and addresses, to tell later whether they were written to or moved."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        # Inference tensors have no version; some other tensors have no address.
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._with_address = list(filter(_has_address, tensors))
        self._versions = _read_versions(self._versioned, torch.Tensor)
        self._addresses = _read_addresses(self._with_address, torch.Tensor)

    def hold(self) -> bool:
        """Whether none of the tensors was written to or moved since."""
        return bool(
            _read_versions(self._versioned, torch.Tensor) == self._versions
            and _read_addresses(self._with_address, torch.Tensor) == self._addresses
        )

    def is_of(self, tensors: Collection[torch.Tensor]) -> bool:
        """Whether `tensors` are the noted ones, in the same order."""
        return same_objects(self._tensors, tensors)

    def has_moved_since(self, other: TensorNote) -> bool:
        """Whether the same tensors lay elsewhere when `other` was made."""
        return bool(self._addresses != other._addresses)

    def same_as(self, other: TensorNote) -> bool:
        """Whether `other` notes the same tensors, not written to in between; they may have moved."""
        return same_objects(self._tensors, other._tensors) and bool(self._versions == other._versions)
