"""The arguments that `norm_rotary` takes, as every implementation of it names them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from harmonica_kernels._checks import broadcasts_to, check_dtype, check_like

_OP = "norm_rotary"
NORMS = ("none", "rms", "layer")

Optional = torch.Tensor | None


class Operands(NamedTuple):
    """The tensors of one call, in the order of the op's schema; shapes are those of the op's docstring."""

    parts: Sequence[torch.Tensor]
    counts: Sequence[int]
    weights: Sequence[Optional]
    biases: Sequence[Optional]
    cos: Sequence[Optional]
    sin: Sequence[Optional]

    @classmethod
    def checked(cls, settings: Settings, *given: Any, **named: Any) -> Operands:
        """The operands of a call with these arguments, which may be given in order or by name.

        Raises:
            TypeError: a dtype is not supported, or the dtypes differ.
            ValueError: the numbers of tensors or the shapes do not fit, or the tensors are on different devices.
        """
        operands = cls(*given, **named)
        operands.check(settings)
        return operands

    def check(self, settings: Settings) -> None:
        """Raise what `checked` raises."""
        _check_counts(self)
        for members in self.results():
            _check_result(self, members, settings)

    def results(self) -> Iterator[range]:
        """For each result, the indices of the parts that it joins."""
        ends = itertools.accumulate(self.counts)
        return (range(end - count, end) for end, count in zip(ends, self.counts, strict=True))

    def shape_of(self, members: range, dim: int) -> list[int]:
        """The shape of the result that joins these parts."""
        shape = list(self.parts[members[0]].shape)
        shape[dim] = sum(self.parts[index].shape[dim] for index in members)
        return shape


class Settings(NamedTuple):
    """The arguments of one call that are no tensors."""

    dim: int = 1
    norm: str = "rms"
    across: bool = False
    eps: float = 1e-5
    interleaved: bool = True


def new_results(operands: Operands, dim: int) -> list[torch.Tensor]:
    """Uninitialised memory for the results."""
    first = operands.parts[0]
    return [first.new_empty(operands.shape_of(members, dim)) for members in operands.results()]


def _check_counts(operands: Operands) -> None:
    parts, counts = len(operands.parts), list(operands.counts)
    if not counts or min(counts) < 1 or sum(counts) != parts:
        raise ValueError(f"{_OP}: counts is {counts} for {parts} parts; expected positive numbers with that sum")
    for name in ("weights", "biases", "cos", "sin"):
        given = len(getattr(operands, name))
        if given != parts:
            raise ValueError(f"{_OP}: got {given} {name} for {parts} parts; give each part one, None where it has none")


def _check_result(operands: Operands, members: range, settings: Settings) -> None:
    dim, norm, across = settings.dim, settings.norm, settings.across
    if norm not in NORMS:
        raise ValueError(f"{_OP}: norm is {norm!r}, expected one of {', '.join(map(repr, NORMS))}")
    first = operands.parts[0]
    check_dtype(_OP, first, name="parts[0]")
    kept = 2 if across else 1
    expected = operands.parts[members[0]].shape
    if not 0 <= dim < len(expected) - kept:
        raise ValueError(f"{_OP}: dim is {dim}, expected a dimension before the last {kept} of {list(expected)}")
    for index in members:
        part, name = operands.parts[index], f"parts[{index}]"
        check_like(_OP, first, name, part, of="parts[0]")
        others = [size for axis, size in enumerate(part.shape) if axis != dim]
        if others != [size for axis, size in enumerate(expected) if axis != dim]:
            raise ValueError(
                f"{_OP}: {name} has shape {list(part.shape)}, expected {list(expected)} except in dimension {dim}"
            )
        _check_vectors(operands, index, kept)
        _check_tables(operands, index)


def _check_vectors(operands: Operands, index: int, kept: int) -> None:
    part = operands.parts[index]
    width = math.prod(part.shape[-kept:])
    for name in ("weights", "biases"):
        vector = getattr(operands, name)[index]
        if vector is not None:
            _check_dtype_of(part, f"{name}[{index}]", vector, halves=False)
            if list(vector.shape) != [width]:
                raise ValueError(
                    f"{_OP}: {name}[{index}] has shape {list(vector.shape)}, expected one number for each that is "
                    f"normed, [{width}]"
                )


def _check_tables(operands: Operands, index: int) -> None:
    part, tables = operands.parts[index], (operands.cos[index], operands.sin[index])
    if (tables[0] is None) is not (tables[1] is None):
        raise ValueError(f"{_OP}: part {index} has only one of cos and sin; give both or neither")
    for name, table in zip(("cos", "sin"), tables, strict=True):
        if table is None:
            continue
        _check_dtype_of(part, f"{name}[{index}]", table, halves=True)
        width = part.shape[-1]
        if width % 2:
            raise ValueError(f"{_OP}: parts[{index}] has rows of {width}; pairs need an even number")
        fits = table.ndim > 0 and table.shape[-1] in (width, width // 2)
        if not fits or not broadcasts_to(table.shape[:-1], part.shape[:-1]):
            raise ValueError(
                f"{_OP}: {name}[{index}] has shape {list(table.shape)}, which does not broadcast to that of its part, "
                f"{list(part.shape)}, or to one number per pair of it; expected e.g. [N, 1, {width}] or [N, 1, "
                f"{width // 2}]"
            )


def _check_dtype_of(part: torch.Tensor, name: str, tensor: torch.Tensor, *, halves: bool) -> None:
    """Vectors and tables have the dtype of the parts or fp32; tables of half types may have fp64 as well."""
    allowed = [part.dtype]
    if part.dtype in (torch.bfloat16, torch.float16):
        allowed += [torch.float32, torch.float64] if halves else [torch.float32]
    if tensor.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise TypeError(f"{_OP}: {name} has dtype {tensor.dtype}, expected {expected}; cast it")
    if tensor.device != part.device:
        raise ValueError(f"{_OP}: {name} is on {tensor.device}, parts are on {part.device}; move one of them")
