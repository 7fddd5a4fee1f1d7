"""Compiles the Triton kernels that calls of ops will launch, several at a time, before the calls come.

Triton compiles a kernel when it is first launched, one after the other. A program that is about to launch dozens of
variants knows them beforehand.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

_ALIGNMENT = 16  # bytes; Triton compiles another kernel for addresses that are no multiple of it


class KernelError(RuntimeError):
    """Triton cannot compile the kernel of a call."""


class OpCall(NamedTuple):
    """A call of an op of this package.

    Attributes:
        op: name of the op.
        args: its arguments by position. Only the layouts of tensors matter, so they may be fake.
        kwargs: its arguments by name.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        shown = (_shown(value) for value in pytree.tree_leaves((self.args, self.kwargs)))
        return f"{self.op}({', '.join(shown)})"


def compile_kernels(calls: Iterable[OpCall], device: torch.device, *, workers: int | None = None) -> int:
    """Compile and load the kernels that these calls launch on a CUDA device; return the number of different calls.

    Where Triton's cache on disk has a kernel, it is only loaded. A tensor is taken to begin at its offset in a storage
    at a multiple of 16 bytes; a call with another address compiles its kernel when it comes.

    Args:
        calls: the calls.
        device: the device.
        workers: number of threads; by default one per CPU core. Most of a compilation releases Python's lock.

    Raises:
        KernelError: the kernel of a call cannot be compiled.
    """
    different = list({str(pytree.tree_map(_layout, _without_places(call))): call for call in calls}.values())
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(lambda call: _compile(call, device), different):
            pass
    for call in different:  # two threads that are a kernel's first ones on a device do not find each other's results
        _compile(call, device)
    return len(different)


def _compile(call: OpCall, device: torch.device) -> None:
    """Run the Triton implementation of an op on tensors without memory, for which nothing is launched."""
    from triton.errors import TritonError

    run = getattr(import_module(f"harmonica_kernels.{call.op}.triton"), f"{call.op}_triton")
    args, kwargs = pytree.tree_map_only(torch.Tensor, _without_memory, (call.args, call.kwargs))
    try:
        with torch.cuda.device(device):
            run(*args, **kwargs)
    except (TritonError, RuntimeError) as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise KernelError(f"Triton cannot compile the kernel of {call} for {device}: {first}") from error


def _without_places(call: OpCall) -> OpCall:
    """The call with zeros for the places of weights: kernels read them at run time, so any places have one kernel."""
    schema = getattr(torch.ops.harmonica, call.op).default._schema
    found = [index for index, argument in enumerate(schema.arguments) if argument.name == "places"]
    args = tuple([0] * len(value) if index in found else value for index, value in enumerate(call.args))
    named = {name: [0] * len(value) if name == "places" else value for name, value in call.kwargs.items()}
    return OpCall(call.op, args, named)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout on the device "meta", at the same offset in its storage."""
    offset = int(tensor.storage_offset())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.empty(offset + max(last, 0) + 1, dtype=tensor.dtype, device="meta")
    return storage.as_strided(tensor.shape, tensor.stride(), offset)


def _layout(value: Any) -> Any:
    """What a kernel is compiled for, of a tensor; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    aligned = value.storage_offset() * value.element_size() % _ALIGNMENT == 0
    return tuple(value.shape), value.stride(), value.dtype, aligned


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
