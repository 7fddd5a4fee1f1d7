"""Memory of the double: who uses it, and what becomes of it once its tensors are gone.

A tensor's memory is handed out twice: to Python, where the end of the last tensor tells that it is free, and to the
launches, which may use it later. Free memory belongs to the CUDA stream that allocated it; the next allocation there
may get it. So it is poisoned then: filled with ones, which are NaN in every format of floating point.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from harmonica_rt.graph.layout import extent

if TYPE_CHECKING:
    from tests.cuda_double.streams import DoubleStream, Seen

POISON = 0xFF


class Memory:
    """One storage.

    Args:
        raw: its bytes, [n] of uint8.
        stream: where it was allocated; None for memory made outside the double, which is never poisoned.
        graph: the graph that allocated it while recording, if any; it lies in the graph's pool then.

    Attributes:
        written, read: the last launch on each CUDA stream that did so.
        users: the CUDA streams given to `record_stream`.
        freed: whether no tensor has it any more.
    """

    def __init__(self, raw: torch.Tensor, stream: DoubleStream | None, graph: Any = None) -> None:
        self.raw = raw
        self.stream = stream
        self.graph = None if graph is None else weakref.ref(graph)
        self.written: Seen = Counter()
        self.read: Seen = Counter()
        self.users: set[DoubleStream] = set()
        self.freed = False

    def poison(self) -> None:
        """Fill it."""
        self.raw.fill_(POISON)


class Memories:
    """All memory, by address."""

    def __init__(self) -> None:
        self.freed: deque[Memory] = deque()  # by the end of a tensor, in any thread, and not looked at yet
        self._own: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._others: dict[int, Memory] = {}  # kept, so that no address means two of them

    def allocate(self, like: torch.Tensor, stream: DoubleStream, graph: Any = None) -> torch.Tensor:
        """A poisoned tensor with the shape, strides and dtype of `like`."""
        size = extent(like.shape, like.stride()) * like.itemsize
        if size == 0:
            return torch.empty_like(like)
        raw = torch.empty(size, dtype=torch.uint8)
        memory = Memory(raw, stream, graph)
        memory.poison()
        lease = (ctypes.c_uint8 * size).from_address(raw.data_ptr())
        weakref.finalize(lease, self.freed.append, memory).atexit = False
        self._own[raw.data_ptr()] = memory
        storage = torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape, like.stride())

    def of(self, tensor: torch.Tensor) -> Memory:
        """The memory of a tensor."""
        address = tensor.untyped_storage().data_ptr()
        found = self._own.get(address) or self._others.get(address)
        if found is None:
            raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            found = self._others[address] = Memory(raw, None)
        return found

    def is_host_number(self, tensor: torch.Tensor) -> bool:
        """Whether it is a number on the host: kernels take it by value, when they are launched."""
        storage = tensor.untyped_storage()
        return storage.nbytes() == tensor.itemsize and tensor.dim() == 0 and storage.data_ptr() not in self._own

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as launches have it: it keeps the memory, but does not count as a use of it."""
        if tensor.numel() == 0:
            return tensor.detach()
        storage = self.of(tensor).raw.untyped_storage()
        layout: tuple[int, Sequence[int], Sequence[int]] = (tensor.storage_offset(), tensor.shape, tensor.stride())
        seen = torch.empty(0, dtype=tensor.dtype).set_(storage, *layout)
        return seen.conj() if tensor.is_conj() else seen
