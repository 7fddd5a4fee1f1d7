"""Launches kernels; what follows from the layouts of the tensors is worked out once per layout.

Before a launch, an op checks its arguments, describes tensors as rows and chooses a grid, and Triton looks at every
argument to find the kernel that it compiled for such ones. That takes several times as long as the launch itself, and
all of it follows from the layouts: shapes, strides, dtypes, devices and alignment. So it is kept (`Prepared`), and a
later call with tensors of the same layouts only fills in their addresses.

Tensors on the device "meta" have a layout and no memory: a call with such tensors compiles kernels for the current
device, and launches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from triton.compiler import CompiledKernel

from harmonica_kernels._build import extension_module

MOST_LAYOUTS: Final = 4096  # kept per op; a plan has some dozens
ALIGNMENT: Final = 16  # bytes; Triton compiles another kernel for addresses that are no multiple of it

Memory = Sequence[Any]  # the tensors of a call, then its results; or their addresses
OptionalTensor = torch.Tensor | None


class NotRows(ValueError):
    """Views that a kernel cannot step through; copies of them have to be used."""


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: the kernel, as `triton.jit` made it.
        programs: number of programs.
        warps: of each.
        arguments: returns the arguments of the kernel, all by position.
    """

    kernel: Any
    programs: int
    warps: int
    arguments: Callable[[Memory], tuple[Any, ...]]


@dataclass(eq=False)
class Prepared:
    """What a call of an op allocates and launches, for tensors of certain layouts.

    Attributes:
        results: shape, strides and dtype of the tensors that it allocates; intermediate results come last.
        returned: number of results that are the op's own.
        launches: its launches, in order.
    """

    results: Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    returned: int
    launches: Sequence[Launch]
    _compiled: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, results: Sequence[torch.Tensor], returned: int, launches: Sequence[Launch]) -> Prepared:
        """What allocates tensors like `results`, which have no memory."""
        return cls([(result.shape, result.stride(), result.dtype) for result in results], returned, launches)

    def run(self, tensors: Sequence[OptionalTensor], addresses: Sequence[int | None]) -> list[torch.Tensor]:
        """Launch on these tensors, which lie at these addresses; the first of them tells the device."""
        first: Any = tensors[0]
        with torch.cuda.device_of(first):
            device = first.device
            results = [
                torch.empty_strided(shape, strides, dtype=dtype, device=device)
                for shape, strides, dtype in self.results
            ]
            if first.is_meta:
                self._compile([*tensors, *results])
                return results[: self.returned]
            to, compiled = [result.data_ptr() for result in results], self._compiled
            if compiled and not any(address % ALIGNMENT for address in to):
                memory = [*addresses, *to]
                for launch, runner in zip(self.launches, compiled, strict=True):
                    runner(*launch.arguments(memory))
            else:
                self._compiled = self._through_triton([*tensors, *results])
        return results[: self.returned]

    def _compile(self, memory: Memory) -> None:
        """Let Triton compile and load the kernels."""
        for kernel, programs, warps, arguments in self.launches:
            grid = (programs, 1, 1)
            compiled = kernel.warmup(*arguments(memory), grid=grid, num_warps=warps, enable_fp_fusion=False)
            if isinstance(compiled, CompiledKernel):
                compiled[grid]  # loads it

    def _through_triton(self, memory: Memory) -> list[Any]:
        """Let Triton find or compile the kernels and launch them; return them bound to their grids.

        Contraction of products and sums into one instruction is off: each is rounded, as in the reference, so a
        residual sum in fp32 has the same bits on every device. (In half types it would anyway: their products are exact
        in fp32.) These kernels are memory-bound, so the additional instruction does not matter.
        """
        found = []
        for kernel, programs, warps, arguments in self.launches:
            compiled = kernel[(programs,)](*arguments(memory), num_warps=warps, enable_fp_fusion=False)
            if isinstance(compiled, CompiledKernel):  # the interpreter returns nothing
                found.append(compiled[(programs, 1, 1)])
        # On AMD's GPUs, Triton also looks at the size of the memory that a tensor is a part of.
        return found if len(found) == len(self.launches) and torch.version.hip is None else []


class Launches:
    """The launches of an op, by the layouts of the tensors that it is called with.

    Args:
        prepare: given tensors and settings, checks them and returns what to launch; None for what no kernel supports.
            Only layouts count, never values.
    """

    def __init__(self, prepare: Callable[..., Prepared | None]) -> None:
        self._prepare = prepare
        self._known: dict[Hashable, Prepared] = {}

    def run(self, tensors: list[OptionalTensor], *settings: Hashable) -> list[torch.Tensor] | None:
        """The results for these tensors, of which the first is not None; or None if no kernel supports them.

        Raises:
            TypeError, ValueError: what `prepare` raises.
        """
        layouts, addresses = _layouts_of(tensors, torch.Tensor)
        key = (layouts, settings)
        prepared = self._known.get(key)
        if prepared is None:
            in_memory = [_in_memory(tensor) for tensor in tensors]
            prepared = self._prepare(in_memory, *settings)
            if prepared is None:
                return None
            if any(a is not b for a, b in zip(in_memory, tensors, strict=True)):
                return prepared.run(in_memory, [])
            if len(self._known) >= MOST_LAYOUTS:
                self._known.clear()
            self._known[key] = prepared
        return prepared.run(tensors, addresses)


def _layouts_in_python(tensors: list[OptionalTensor], kind: type) -> tuple[Hashable, list[int | None]]:
    layouts: list[Hashable] = []
    addresses: list[int | None] = []
    for tensor in tensors:
        if tensor is None:
            layouts.append(None)
            addresses.append(None)
            continue
        address = tensor.data_ptr()
        addresses.append(address)
        flags = address % ALIGNMENT == 0, not address or tensor.is_neg()
        layouts += tensor.shape, tensor.stride(), tensor.dtype, tensor.device, flags
    return tuple(layouts), addresses


_layouts_of: Callable[..., tuple[Hashable, list[int | None]]] = getattr(
    extension_module(), "layouts_of", _layouts_in_python
)
"""_layouts_of(tensors, torch.Tensor): what a launch depends on besides addresses, to be hashed; and the addresses."""


def _in_memory(tensor: OptionalTensor) -> OptionalTensor:
    """The tensor, or a copy if its values are not those in its memory.

    This is the case for negated views and zero tensors without memory. The dispatcher materialises them before it calls
    an op, but not if they come in a list of optional tensors, as gates do.
    """
    return tensor.clone() if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()) else tensor
