"""Kernels: one launch on the device, with the bytes that it moves and the FLOPs that it does."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Kind(enum.Enum):
    """What limits a kernel, besides memory."""

    PRODUCT = "product"  # matrix products and convolutions: tensor cores
    ATTENTION = "attention"  # fused attention: tensor cores, less well used
    MEMORY = "memory"  # everything else: bytes alone
    HARMONICA = "harmonica"  # an operator of this project; bytes alone


class Access(NamedTuple):
    """Memory that a kernel reads or writes.

    Attributes:
        buffer: number of the storage.
        view: offset, shape and strides within it.
        nbytes: bytes moved; elements that an expanded view repeats count once.
    """

    buffer: int
    view: tuple[int, tuple[int, ...], tuple[int, ...]]
    nbytes: int


class Extent(NamedTuple):
    """A product of `[rows, depth]` and `[depth, columns]` in each of `batch`; in attention, queries, depth and keys."""

    batch: int
    rows: int
    columns: int
    depth: int


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: the operator, or the operators, that it computes.
        kind: what limits it.
        reads: memory read.
        writes: memory written.
        flops: FLOPs, as torch's flop counter counts them: products and attention only.
        dtype: dtype of its first operand.
        extent: size of the product; None for memory kernels.
        where: path of the module that it belongs to.
        region: number of the compiled region that it is in; None outside of regions.
    """

    name: str
    kind: Kind
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: int = 0
    dtype: torch.dtype = torch.bfloat16
    extent: Extent | None = None
    where: str = ""
    region: int | None = None

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(access.nbytes for access in self.reads)

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(access.nbytes for access in self.writes)

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def work(kernels: Iterable[Kernel]) -> tuple[int, int, int, int]:
    """Number of kernels, bytes read, bytes written, and FLOPs."""
    listed = list(kernels)
    return (
        len(listed),
        sum(kernel.read for kernel in listed),
        sum(kernel.written for kernel in listed),
        sum(kernel.flops for kernel in listed),
    )
