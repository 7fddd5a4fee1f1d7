"""Tensors that stay where they are, and that changing values are copied into: what graphs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

ALIGNMENT = 64  # bytes


class StaticTensors:
    """One tensor at a fixed address for each name, laid out as the first value that came under it."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(distinct(tensor).nbytes for tensor in self.tensors.values())

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy each value under its name; those of one dtype in one call, which a GPU turns into few launches."""
        copied: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, value in values.items():
            if name not in self.tensors:
                self.tensors[name] = _empty(value)
            target = self.tensors[name]
            to, of = copied.setdefault(value.dtype, ([], []))
            to.append(distinct(target))
            of.append(distinct(value, target))
        for to, of in copied.values():
            torch._foreach_copy_(to, of)


class StaticRows:
    """Values that are other ones in every step, packed, so that one copy a dtype brings in those of a step.

    Args:
        examples: the values of one step, whose layout all steps have.
    """

    def __init__(self, examples: Mapping[str, torch.Tensor]) -> None:
        self._places: dict[str, tuple[torch.dtype, int]] = {}  # name -> dtype, first element
        sizes: dict[torch.dtype, int] = {}
        for name, value in examples.items():
            start = sizes.get(value.dtype, 0)
            self._places[name] = (value.dtype, start)
            unit = ALIGNMENT // value.dtype.itemsize
            sizes[value.dtype] = start + -(-_extent(value) // unit) * unit
        device = next(iter(examples.values())).device
        with torch.inference_mode(False), torch.no_grad():
            self._row = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
            self.tensors = {
                name: self._row[dtype].as_strided(examples[name].shape, examples[name].stride(), start)
                for name, (dtype, start) in self._places.items()
            }
        self._table: dict[torch.dtype, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the row and of the table."""
        return sum(tensor.nbytes for tensor in (*self._row.values(), *self._table.values()))

    def put(self, values: Mapping[str, torch.Tensor]) -> None:
        """Bring in the values of a step as they are."""
        names = list(values)
        for dtype in self._row:
            chosen = [name for name in names if self._places[name][0] is dtype]
            targets = [self.tensors[name] for name in chosen]
            torch._foreach_copy_(
                [distinct(target) for target in targets],
                [distinct(values[name], target) for name, target in zip(chosen, targets, strict=True)],
            )

    def tabulate(self, names: Sequence[str], stacked: Sequence[torch.Tensor]) -> None:
        """Keep the values of all steps, `[steps, ...]` each, for `select`."""
        steps = stacked[0].shape[0]
        for dtype, row in self._row.items():
            if dtype not in self._table or self._table[dtype].shape[0] != steps:
                with torch.inference_mode(False), torch.no_grad():
                    self._table[dtype] = row.new_empty((steps, row.numel()))
        for name, values in zip(names, stacked, strict=True):
            dtype, start = self._places[name]
            table, one = self._table[dtype], self.tensors[name]
            column = table.as_strided((steps, *one.shape), (table.shape[1], *one.stride()), start)
            distinct(column).copy_(distinct(values, column))

    def select(self, step: int) -> None:
        """Bring in the values of a step of the table."""
        for dtype, row in self._row.items():
            row.copy_(self._table[dtype][step])


def distinct(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor without repetitions along the dimensions that are expanded in `like` (default: in itself)."""
    layout = tensor if like is None else like
    for dim, (n, stride) in enumerate(zip(layout.shape, layout.stride(), strict=True)):
        if stride == 0 and n > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _empty(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _extent(value: torch.Tensor) -> int:
    """Elements from the first to the last one."""
    return 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
